"""Host time and all-gathers of micro-steps under ZeRO-1 and ZeRO-3, in a model of real depth and small width.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node 2 -m benchmarks.model.zero_stages

The two ranks run rows of different numbers of clips, so of different numbers of tower groups, which change in every
micro-step. Both stages run the same rows in turn. A narrow model computes little, so the processor's time is mostly
that of the calls: what a GPU waits for if it is more than its own work. The trace is DeepSpeed's record of the order of
modules. While it is complete, the parameters of the next modules are gathered ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
import unittest.mock
from collections.abc import Iterator
from pathlib import Path

import deepspeed.comm.comm
import numpy as np

from benchmarks.loading.lengths import PATCHES
from benchmarks.training.packing import result_row
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import InitFromConfig, LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.trainer.distributed.process_group import (
    DistributedContext,
    all_reduce_sum,
    destroy_process_group,
    init_process_group,
)
from framestream.trainer.training import engine as training_engine
from framestream.trainer.training.deepspeed_config import deepspeed_config
from framestream.trainer.training.engine import TrainingEngine

MANIFEST = Path(__file__).parents[2] / "manifests" / "stage3.yaml"
SIZE = 128  #: pixels of a frame
PUBLISHED_WIDTH = 1024  #: of the tower
CLIP_PATCHES = 4 * (SIZE // 16) ** 2
WORDS = 40  #: tokens of text in a row


@dataclasses.dataclass
class MicroStepCount:
    """What one micro-step of one rank took."""

    groups: int
    seconds: float  #: of the processor, all threads of this rank
    all_gathers: int
    is_complete: bool  #: DeepSpeed's trace, after the micro-step; True without ZeRO-3


def narrow_manifest(stage: int, width: int, dtype: str = "bf16") -> Manifest:
    """Return stage 3 with a model of published depth and proportions, and a tower of ``width`` channels, not 1,024.

    A group of the tower is one clip.
    """
    manifest, hidden = load_manifest(MANIFEST), 7 * width // 2
    model = ModelConfig(
        vision_tower=VisionTowerConfig(width=width, heads=4, table_side=8, group_tokens=CLIP_PATCHES),
        language_model=LanguageModelConfig(
            hidden_size=hidden,
            intermediate_size=37 * width // 2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=43 * hidden,
        ),
    )
    # norms and biases are kept on every rank, and no matrix is, as in the published model
    train = dataclasses.replace(manifest.train, zero_stage=stage, dtype=dtype, persistence_threshold=width**2 - 1)
    init = InitFromConfig(vision_tower="random", language_model="random")
    frames = dataclasses.replace(manifest.frames, size=SIZE)
    return dataclasses.replace(manifest, model=model, train=train, init_from=init, frames=frames)


@contextlib.contextmanager
def counted_all_gathers() -> Iterator[list[int]]:
    """Count the all-gathers that DeepSpeed issues in the block: a list of the elements of each."""
    backend, sizes = deepspeed.comm.comm.cdb, []
    gather = backend.all_gather_into_tensor

    def counting(output_tensor, *arguments, **options):
        sizes.append(output_tensor.numel())
        return gather(output_tensor, *arguments, **options)

    backend.all_gather_into_tensor = counting
    try:
        yield sizes
    finally:
        del backend.all_gather_into_tensor


def build_narrow_engine(manifest: Manifest, context: DistributedContext) -> TrainingEngine:
    """Build the engine with DeepSpeed's own limits in proportion to the model."""
    scale = (PUBLISHED_WIDTH / manifest.model.vision_tower.width) ** 2

    def scaled(*arguments) -> dict:
        config = deepspeed_config(*arguments)
        for name in ("stage3_max_live_parameters", "stage3_max_reuse_distance"):
            config["zero_optimization"][name] = int(10**9 / scale)
        return config

    with unittest.mock.patch.object(training_engine, "deepspeed_config", scaled):
        return training_engine.build_engine(manifest, context)[0]


def run_micro_step(
    engine: TrainingEngine, clips: int, context: DistributedContext, is_last: bool = False
) -> MicroStepCount:
    """Run forward and backward pass of a row with ``clips`` clips, and the optimizer's step if ``is_last``."""
    row = result_row(np.array([64 * clips + WORDS]), np.array([clips * 4 * PATCHES]), seed=clips, size=SIZE)
    row = row.to(context.device)
    begun = time.process_time()
    with counted_all_gathers() as gathers:
        loss = engine(row)
        engine.set_gradient_accumulation_boundary(is_last)
        engine.backward(loss)
        seconds, count = time.process_time() - begun, len(gathers)
        engine.step()
    is_complete = True
    if engine.zero_optimization_stage() == 3:
        is_complete = engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    return MicroStepCount(max(clips, 1), seconds, count, is_complete)


def measure(context: DistributedContext, width: int, clips: list[int]) -> None:
    """Run rows of ``clips`` clips, on the second rank in reverse order, under both stages in turn, and print them."""
    order = clips if context.is_main else clips[::-1]
    engines = {stage: build_narrow_engine(narrow_manifest(stage, width), context) for stage in (1, 3)}
    for engine in engines.values():  # the first micro-step records the trace
        for _ in range(2):
            run_micro_step(engine, 1, context)
    totals = dict.fromkeys(engines, 0.0)
    for number, count in enumerate(order):
        for stage, engine in engines.items():
            found = run_micro_step(engine, count, context, number == len(order) - 1)
            totals[stage] += found.seconds
            trace = "" if stage == 1 else f", trace {'complete' if found.is_complete else 'not complete'}"
            if context.is_main:
                what = f"ZeRO-{stage}, {found.groups:2} groups: {found.seconds:6.2f} s, {found.all_gathers} all-gathers"
                print(what + trace, flush=True)
    seconds = all_reduce_sum([totals[1], totals[3]], context)
    if context.is_main:
        print(f"host time of both ranks, ZeRO-3 / ZeRO-1: {seconds[1] / seconds[0]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16, help="channels of the tower")
    parser.add_argument("--clips", type=int, nargs="+", default=[31, 33, 16, 32], help="of each micro-step")
    options = parser.parse_args()
    context = init_process_group(timeout_minutes=10)
    try:
        measure(context, options.width, options.clips)
    finally:
        destroy_process_group()


if __name__ == "__main__":
    main()
