"""Peak memory of training steps beside the estimate of the trainer, for rows and levels of recomputation.

    python -m benchmarks.model.memory

Steps run in the trainer's engine at the published widths, with few layers, on the tests' stand-in device. It counts the
bytes that are allocated, as torch does on a GPU, and needs a compiler. Matrix products and attention are not computed:
only their results are allocated, and what a fused attention keeps. So memory is that of real steps, and values mean
nothing. The second table has the estimate of ``python -m trainer --dry-run`` for the fullest rows of the published
manifests.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training.packing import result_row
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import InitFromConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.trainer.model.memory_estimate import GIB, estimate_memory, fullest_row
from framestream.trainer.training.memory_plan import row_shape
from tests.helpers.emulator import install

MANIFESTS = Path(__file__).parents[2] / "manifests"
RANDOM = InitFromConfig(vision_tower="random", connector="random", language_model="random")
STEPS = 2  #: the moments are allocated in the first
MICRO_STEPS = 2  #: of a step: the first leaves its gradients to the second
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A row of ``dialogues`` equal dialogues, and the settings it is trained with."""

    name: str
    clips: int  #: of a dialogue
    text: int  #: tokens of a dialogue
    dialogues: int = 1
    level: str = "all"  #: train.gradient_checkpointing
    zero_stage: int = 3
    tower: VisionTowerConfig = VisionTowerConfig(depth=5)
    layers: int = 1
    lora: LoraConfig | None = None  #: adapters of the language model, beside a frozen tower


INTERNVIDEO2 = VisionTowerConfig(type="internvideo2", width=1408, depth=4, patch=14, mlp_ratio=48 / 11)
LORA = LoraConfig(r=64, alpha=128, dropout=0.05)
CASES = (
    Case("text, all recomputed", clips=1, text=1984, level="all", tower=VisionTowerConfig(depth=3), layers=3),
    Case("text, nothing recomputed", clips=1, text=1984, level="none", tower=VisionTowerConfig(depth=3), layers=3),
    Case("32 frames, all recomputed", clips=8, text=64),
    Case("64 frames, nothing recomputed", clips=16, text=64, level="none"),
    Case("4 x 1,000 tokens of text, one layer recomputed", 0, 1000, 4, "layers:1", 2, VisionTowerConfig(depth=3), 3),
    Case("32 frames, InternVideo2", clips=8, text=64, tower=INTERNVIDEO2),
    Case("64 frames and 1,024 tokens of text, adapters", 16, 1024, zero_stage=2, layers=3, lora=LORA),
    Case("the same, nothing recomputed", 16, 1024, level="none", zero_stage=2, layers=3, lora=LORA),
)


def case_manifest(case: Case) -> Manifest:
    """Return stage 3 of the 2B model at 224 pixels, with the layers of a case and a small vocabulary."""
    manifest = load_manifest(MANIFESTS / "2b" / "stage3.yaml")
    language = dataclasses.replace(
        manifest.model.language_model, num_hidden_layers=case.layers, vocab_size=4096, max_position_embeddings=32_768
    )
    train = dataclasses.replace(manifest.train, gradient_checkpointing=case.level, zero_stage=case.zero_stage)
    if case.lora:
        adapted = PartConfig(train=True, lr=1e-4, lora=case.lora)
        train = dataclasses.replace(train, language_model=adapted, vision_tower=PartConfig(train=False))
    return dataclasses.replace(
        manifest,
        model=ModelConfig(vision_tower=case.tower, language_model=language),
        frames=dataclasses.replace(manifest.frames, size=224),
        train=train,
        init_from=RANDOM,
    )


class FusedAttention(torch.autograd.Function):
    """Allocate what a fused attention allocates: its output, and a float32 number for each query and head."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(q)
        ctx.save_for_backward(q, k, v, out, torch.zeros(q.shape[:-1], dtype=torch.float32, device=q.device))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def skip_products() -> torch.library.Library:
    """Let products on the stand-in device return zeros; return what keeps that in force."""
    library = torch.library.Library("aten", "IMPL")

    def mm(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first.new_zeros(first.shape[0], second.shape[1])

    def addmm(bias: torch.Tensor, first: torch.Tensor, second: torch.Tensor, **scale: float) -> torch.Tensor:
        return mm(first, second)

    def bmm(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return first.new_zeros(first.shape[0], first.shape[1], second.shape[2])

    for function in (mm, addmm, bmm):
        library.impl(function.__name__, function, "PrivateUse1")
    torch.nn.functional.scaled_dot_product_attention = lambda q, k, v, **options: FusedAttention.apply(q, k, v)
    return library


def measure_memory(case: Case, context: Any) -> tuple[int, int]:
    """Return the peak bytes of two steps, in forward pass, backward pass and update, and the estimate."""
    from framestream.trainer.training.engine import build_engine

    manifest = case_manifest(case)
    before = torch.emu.memory_allocated()  # type: ignore[attr-defined]
    engine, model = build_engine(manifest, context)
    lengths = [case.clips * 64 + case.text] * case.dialogues
    row = result_row(np.array(lengths), np.array([case.clips * 4 * 256] * case.dialogues), seed=0, size=224)
    row.drop_path_rand = torch.zeros(len(row.clips), model.vision_tower.num_drop_path_rands)
    torch.emu.reset_peak_memory_stats()  # type: ignore[attr-defined]
    for number in range(1, STEPS * MICRO_STEPS + 1):
        loss = engine(row.to(context.device))
        engine.set_gradient_accumulation_boundary(number % MICRO_STEPS == 0)
        engine.backward(loss)
        if number % MICRO_STEPS == 0:
            engine.step()
    peak = torch.emu.max_memory_allocated() - before  # type: ignore[attr-defined]
    engine.destroy()  # type: ignore[attr-defined]
    del engine, model, loss
    gc.collect()
    return peak, estimate_memory(manifest, row_shape(row), 1, gpu=False).total


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--cases", type=int, nargs="+", default=range(1, len(CASES) + 1), help="numbers of rows")
    parser.add_argument("--ranks", type=int, default=32, help="of the published manifests")
    options = parser.parse_args()
    install()
    from framestream.trainer.distributed.process_group import destroy_process_group, init_process_group

    context, library = init_process_group(timeout_minutes=5), skip_products()
    print("| row | ZeRO stage | measured, MiB | estimated | estimated / measured |")
    print("| --- | --- | --- | --- | --- |")
    for case in (CASES[number - 1] for number in options.cases):
        peak, estimated = measure_memory(case, context)
        sizes = f"{peak / MIB:,.0f} | {estimated / MIB:,.0f} | {estimated / peak:.2f}"
        print(f"| {case.name} | {case.zero_stage} | {sizes} |", flush=True)
    destroy_process_group()
    del library
    print(f"\n| fullest row of, on {options.ranks} GPUs | states | gathered | buffers | kept | working | in all, GiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    names = [f"stage{stage}" for stage in (1, 2, 3, 4)] + ["2b/stage3", "internvideo2/stage3"]
    for name in names:
        manifest = load_manifest(MANIFESTS / f"{name}.yaml")
        estimate = estimate_memory(manifest, fullest_row(manifest), options.ranks)
        parts = " | ".join(f"{size / GIB:.1f}" for size in (*dataclasses.astuple(estimate), estimate.total))
        print(f"| `manifests/{name}.yaml` | {parts} |")


if __name__ == "__main__":
    main()
