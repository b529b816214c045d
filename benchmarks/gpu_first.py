"""Measure within a quarter of an hour what matters first on one GPU. Every finding is a line of JSON.

    python -m benchmarks.gpu_first [--parts zero3 step tower layers syncs copies head] [--small] [--device cuda]

Weights and rows are random and full-size: the published stage 3 with UMT-L and Qwen2-7B, and in ``zero3`` UMT-L with
Qwen2.5-1.5B. No shards, media or files are read. A part that fails prints why, and the next one runs. So the command
can be started where packages are missing: only ``zero3`` needs deepspeed.

- ``zero3``: the trainer's engine. Does it start, are its buffers on the device, and what does a micro-step cost the
  host and the GPU when rows change? ZeRO-3 beside ZeRO-1.
- ``step``: forward and backward pass of the complete model: seconds, MFU, and peak memory beside the estimate.
- ``tower``: milliseconds of a clip by size of a group.
- ``layers``: layers of the language model with each kind of attention, by number of dialogues.
- ``syncs``: where the host waits for the device in a micro-step.
- ``copies``: copies of pixels, and the rates of products and of memory that ``benchmarks.scale`` assumes.
- ``head``: the loss by number of labeled tokens.

``--small`` runs tiny sizes on the CPU, or with ``--device emu`` on the stand-in device of the tests. That shows that
the command works, and its seconds say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read when torch is imported

import torch
from torch import nn

from benchmarks.model.random_model import LEARNED, fill_weights, make_row, place_module
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import InitFromConfig, ModelConfig
from framestream.pipeline.config.training import Recomputation
from framestream.trainer.model import attention, cost
from framestream.trainer.model.language_model import build_language_model
from framestream.trainer.model.lm_head import ChunkedLMHead
from framestream.trainer.model.memory_estimate import GIB, RowShape, estimate_memory
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.monitoring.device import peak_flops
from tests.helpers.paths import ROOT

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Setting:
    """Where and on which model is measured."""

    device: torch.device
    manifest: Manifest
    small: bool

    @property
    def size(self) -> int:
        """Return the pixels along a side of a frame."""
        return self.manifest.frames.size

    @property
    def model(self) -> ModelConfig:
        """Return the architecture."""
        return self.manifest.model

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()

    def peak(self, reset: bool = False) -> float | None:
        """Return the peak memory in GiB since the last reset; None where there is no GPU."""
        if self.device.type != "cuda":
            return None
        if reset:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / GIB

    def time(self, run: Callable[[], Any], repeats: int = 3, warmup: int = 2) -> dict[str, float]:
        """Return the median seconds of one call, and those until the host had started all of its kernels."""
        for _ in range(warmup):
            run()
        self.synchronize()
        walls, hosts = [], []
        for _ in range(repeats):
            started = time.perf_counter()
            run()
            hosts.append(time.perf_counter() - started)
            self.synchronize()
            walls.append(time.perf_counter() - started)
        return {"wall_s": statistics.median(walls), "host_s": statistics.median(hosts)}


def print_finding(part: str, **values: Any) -> None:
    """Print a finding as a line of JSON; numbers have five digits."""
    rounded = {name: float(f"{v:.5g}") if isinstance(v, float) else v for name, v in values.items()}
    print(json.dumps({"part": part, **rounded}), flush=True)


# ------------------------------------------------------------------------------------------------------ models and rows


def make_full_model(setting: Setting, cfg: ModelConfig | None = None) -> VideoLLM:
    """Make a complete model that recomputes everything."""
    cfg = cfg or setting.model
    recompute = Recomputation(True, cfg.language_model.num_hidden_layers)
    frames = setting.manifest.frames
    return place_module(setting.device, lambda: VideoLLM(cfg, frames.size, frames.clip_frames, recompute))


# ---------------------------------------------------------------------------------------------------------------- parts


def measure_copies(setting: Setting) -> None:
    """Copy frames from pageable and from pinned memory; multiply and add large matrices."""
    size = setting.size
    for frames in (8,) if setting.small else (512, 2048):
        pixels = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8)
        kinds = {"pageable": pixels} | ({"pinned": pixels.pin_memory()} if setting.device.type == "cuda" else {})
        for kind, source in kinds.items():
            found = setting.time(lambda source=source: source.to(setting.device, non_blocking=True))
            print_finding(
                "copies", kind=kind, MB=pixels.nbytes / 1e6, GBps=pixels.nbytes / found["wall_s"] / 1e9, **found
            )
    side = 256 if setting.small else 8192
    a = torch.randn(side, side, dtype=DTYPE, device=setting.device)
    found = setting.time(lambda: a @ a)
    print_finding("copies", kind="product", TFLOPs=2 * side**3 / found["wall_s"] / 1e12, **found)
    found = setting.time(lambda: a + a)
    print_finding("copies", kind="sum", TBps=3 * a.nbytes / found["wall_s"] / 1e12, **found)


def measure_tower(setting: Setting) -> None:
    """Run the tower forward and backward over one group of several sizes."""
    language = dataclasses.replace(setting.model.language_model, num_hidden_layers=1, vocab_size=128)
    part, (_, spanned) = cost.part_costs(setting.manifest)["vision_tower"], cost.tower_tokens(setting.manifest)
    for clips in (2, 4) if setting.small else (8, 16, 32, 64):
        tower_cfg = dataclasses.replace(setting.model.vision_tower, group_tokens=clips * spanned)
        cfg = dataclasses.replace(setting.model, vision_tower=tower_cfg, language_model=language)
        tower = make_full_model(setting, cfg).vision_tower
        row = make_row(setting.size, [clips], [LEARNED + 2])
        anchor = torch.zeros((), device=setting.device, requires_grad=True)
        pixels = row.clips.to(setting.device), row.image_tiles.to(setting.device)
        setting.peak(reset=True)
        found = setting.time(lambda tower=tower, p=pixels, anchor=anchor: tower(*p, anchor).float().mean().backward())
        work = clips * (part.token * spanned + part.pair * spanned**2)
        rates = {"ms_a_clip": 1e3 * found["wall_s"] / clips, "model_TFLOPs": work / found["wall_s"] / 1e12}
        print_finding("tower", clips=clips, peak_GiB=setting.peak(), **rates, **found)
        del tower


def attention_kinds(setting: Setting) -> Iterator[attention.AttentionKernel]:
    """Yield every implementation of attention that runs here; the first is the slowest and the reference."""
    yield attention.AttentionKernel("SDPA, a call for each run", attention.attend_sdpa)
    if setting.device.type == "cuda":
        if attention.varlen_attn is not None:
            yield attention.AttentionKernel("varlen_attn", attention.varlen_kernel(attention.varlen_attn))
        if attention.flash_attn_varlen_func is not None:
            yield attention.AttentionKernel("flash-attn", attention.flash_kernel(attention.flash_attn_varlen_func))


def measure_layers(setting: Setting) -> None:
    """Run layers of the language model with every kind of attention, over rows of 1, 4 and 32 dialogues."""
    layers, total = (1, 256) if setting.small else (4, 8448)
    cfg = dataclasses.replace(setting.model.language_model, num_hidden_layers=layers, vocab_size=128)
    model, selected = place_module(setting.device, lambda: build_language_model(cfg)).model, attention.select_kernel
    weights = sum(p.numel() for p in model.layers.parameters())
    outputs: dict[str, torch.Tensor] = {}
    try:
        for kernel in attention_kinds(setting):
            attention.select_kernel = lambda *_, kernel=kernel: kernel  # type: ignore[assignment]
            for dialogues in (1, 4, 32):
                lengths = [total // dialogues + n % 3 for n in range(dialogues)]
                segments = attention.AttentionSegments.of_runs([(1, n) for n in lengths], setting.device)
                positions = torch.cat([torch.arange(n, device=setting.device) for n in lengths])[None]
                generator = torch.Generator().manual_seed(dialogues)
                x = torch.randn(1, sum(lengths), cfg.hidden_size, generator=generator).to(setting.device, DTYPE)
                x.requires_grad_()

                def run(x=x, positions=positions, segments=segments) -> torch.Tensor:
                    return model(
                        inputs_embeds=x, position_ids=positions, segments=segments, use_cache=False
                    ).last_hidden_state

                setting.peak(reset=True)
                found = setting.time(lambda run=run: run().float().mean().backward())
                pairs = sum(n * n for n in lengths)
                work = 6 * weights * sum(lengths) + 6 * layers * cfg.hidden_size * pairs
                rates = {"ms_a_layer": 1e3 * found["wall_s"] / layers, "model_TFLOPs": work / found["wall_s"] / 1e12}
                print_finding(
                    "layers", kind=kernel.name, dialogues=dialogues, peak_GiB=setting.peak(), **rates, **found
                )
            outputs[kernel.name] = run().detach().float()
        first = next(iter(outputs.values()))
        differences = {name: float((output - first).abs().max()) for name, output in outputs.items()}
        print_finding("layers", largest_difference=differences)
    finally:
        attention.select_kernel = selected


def measure_head(setting: Setting) -> None:
    """Compute the loss of several numbers of labeled tokens, forward and backward."""
    language = setting.model.language_model
    for learned in (16,) if setting.small else (64, 512, 4096):
        head = place_module(
            setting.device, lambda: ChunkedLMHead(nn.Linear(language.hidden_size, language.vocab_size, bias=False))
        )
        hidden = torch.randn(learned, language.hidden_size, dtype=DTYPE, device=setting.device, requires_grad=True)
        targets = torch.full((learned,), 3, device=setting.device)
        weights = torch.ones(learned, device=setting.device)
        setting.peak(reset=True)
        found = setting.time(lambda *_, a=(hidden, targets, weights), head=head: head(*a).backward())
        print_finding("head", learned=learned, peak_GiB=setting.peak(), **found)


def measure_step(setting: Setting) -> None:
    """Run the complete model forward and backward, without an optimizer."""
    model, peak_rate = make_full_model(setting), peak_flops(setting.manifest.train, setting.device)
    weights = setting.peak()
    cases = ((2, 60, 1), (2, 60, 2)) if setting.small else ((128, 256, 1), (64, 256, 4), (16, 200, 4))
    for clips, text, dialogues in cases:
        row = make_row(setting.size, [clips] * dialogues, [text] * dialogues)
        setting.peak(reset=True)
        found = setting.time(lambda row=row: model(row.to(setting.device)).backward(), warmup=1)
        work = cost.row_flops(setting.manifest, len(row.clips), 0, row.lengths, LEARNED * dialogues)
        mfu = None if peak_rate is None else work / found["wall_s"] / peak_rate
        shape = RowShape(len(row.clips), 0, row.tokens, LEARNED * dialogues)
        estimate = estimate_memory(setting.manifest, shape, world=1)
        activations = (estimate.kept + estimate.working) / GIB
        memory = {"peak_GiB": setting.peak(), "weights_GiB": weights, "estimated_activations_GiB": activations}
        size = {"frames": row.frames, "tokens": row.tokens, "dialogues": dialogues}
        print_finding("step", **size, mfu=mfu, model_TFLOPs=work / found["wall_s"] / 1e12, **memory, **found)


def measure_syncs(setting: Setting) -> None:
    """Count the places where the host waits for the device in one micro-step."""
    language = dataclasses.replace(setting.model.language_model, num_hidden_layers=2)
    model = make_full_model(setting, dataclasses.replace(setting.model, language_model=language))
    row = make_row(setting.size, [4 if setting.small else 16] * 2, [100] * 2).to(setting.device)
    model(row).backward()
    setting.synchronize()
    if setting.device.type == "cuda":
        print_finding("syncs", waits=dict(_cuda_waits(lambda: model(row).backward())))
    elif setting.device.type == "emu":
        from tests.helpers.emulator.device import count_events

        with count_events() as events:
            model(row).backward()
        print_finding("syncs", waits=dict(events.waits()))


def _cuda_waits(run: Callable[[], None]) -> Counter[str]:
    """Count the waits of ``run`` by the line of the trainer that causes them."""
    found: Counter[str] = Counter()

    def note(*_: Any, **__: Any) -> None:
        lines = [f for f in traceback.extract_stack() if "/trainer/" in f.filename]
        found[f"{lines[-1].filename.rsplit('/', 1)[-1]}:{lines[-1].lineno}" if lines else "elsewhere"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown, warnings.showwarning = warnings.showwarning, note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown
    return found


def measure_zero3(setting: Setting) -> None:
    """Run micro-steps of the trainer's engine on one rank, with rows that change, under ZeRO-3 and ZeRO-1."""
    from framestream.trainer.distributed.process_group import destroy_process_group, init_process_group
    from framestream.trainer.training import engine as engines

    engines.initialize = lambda model, manifest: fill_weights(model)
    language = setting.model.language_model
    if not setting.small:
        language = load_manifest(ROOT / "manifests" / "2b" / "stage3.yaml").model.language_model
    random = InitFromConfig(vision_tower="random", language_model="random")
    model = dataclasses.replace(setting.model, language_model=language)
    clips = setting.model.vision_tower.group_tokens // cost.tower_tokens(setting.manifest)[1]
    context = init_process_group(10.0)
    try:
        for stage in (3, 1):
            train = dataclasses.replace(setting.manifest.train, zero_stage=stage)
            manifest = dataclasses.replace(setting.manifest, model=model, init_from=random, train=train)
            engine, built = engines.build_engine(manifest, context)
            on = sorted({str(buffer.device) for buffer in built.buffers()})
            print_finding("zero3", zero_stage=stage, buffers_on=on, device=str(context.device))
            for number, groups in enumerate((2, 2, 2, 1, 3, 2)):
                each, dialogues = (2, groups) if setting.small else (groups * clips, 1)
                row = make_row(setting.size, [each] * dialogues, [64] * dialogues)
                setting.synchronize()
                started, boundary = time.perf_counter(), number in (2, 5)
                loss = engine(row.to(context.device))
                engine.set_gradient_accumulation_boundary(boundary)
                engine.backward(loss)
                host = time.perf_counter() - started
                setting.synchronize()
                wall = time.perf_counter() - started
                if boundary:
                    engine.step()
                spent = {"wall_s": wall, "host_s": host, "peak_GiB": setting.peak()}
                print_finding(
                    "zero3", zero_stage=stage, micro_step=number, groups=groups, trace=_trace(engine), **spent
                )
            engine.destroy()
            del engine, built, loss
    finally:
        destroy_process_group()


def _trace(engine: Any) -> str | None:
    """Return whether ZeRO-3 knows the order of modules (COMPLETE) and so gathers weights ahead; None without it."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    coordinator = offload and offload.get_param_coordinator()
    return coordinator and coordinator._PartitionedParameterCoordinator__trace_mode.name


PARTS = {
    "zero3": measure_zero3,
    "step": measure_step,
    "tower": measure_tower,
    "layers": measure_layers,
    "syncs": measure_syncs,
    "copies": measure_copies,
    "head": measure_head,
}


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; returns the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_first", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument(
        "--device", choices=("cuda", "cpu", "emu"), help="cuda, or with --small cpu; emu: the tests' device"
    )
    options = parser.parse_args(arguments)
    name = options.device or ("cpu" if options.small else "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU; --small --device cpu tries the command without one")
    if name == "emu":
        from tests.helpers.emulator.install import install

        install()
    elif name == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    manifest = load_manifest(ROOT / "manifests" / ("demo/stage3.yaml" if options.small else "stage3.yaml"))
    setting = Setting(torch.device(name), manifest, options.small)
    gpu = torch.cuda.get_device_name() if name == "cuda" else name
    kernel = attention.select_kernel(name, DTYPE, 128).name
    print_finding("versions", torch=torch.__version__, device=gpu, attention=kernel)
    failed = 0
    for part in options.parts:
        started = time.perf_counter()
        try:
            PARTS[part](setting)
        except Exception as error:  # the next part may run
            failed += 1
            places = [f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            print_finding(part, failed=f"{type(error).__name__}: {str(error)[:300]}", at=places[-4:])
        with contextlib.suppress(AttributeError, RuntimeError):
            torch.get_device_module(setting.device).empty_cache()
        print_finding(part, seconds=time.perf_counter() - started)
    return failed


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a thread of autograd may still end its work, at which Python's own exit would abort
