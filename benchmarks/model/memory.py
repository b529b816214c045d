"""Peak memory of a training step by stage and frames: measured for the demo's model, estimated for the published ones.

    python -m benchmarks.model.memory

Each case is measured on the CPU in its own process, on a row of one video and 256 tokens of text. The measurement is
the largest growth of the resident set, from before the engine is built to the end of the second step. Beside it stands
the estimate of ``framestream.trainer.model.cost.estimate_memory`` for the same row on one rank. ``python -m trainer
--dry-run`` prints the same estimate. For the published manifests only the estimate is printed, for 32 ranks.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.loading.lengths import PATCHES, TOKENS_PER_FRAME
from benchmarks.training.packing import result_row
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.model import InitFromConfig
from framestream.trainer.model.cost import estimate_memory
from framestream.trainer.monitoring.device import process_peak

MANIFESTS = Path(__file__).parents[2] / "manifests"
RANDOM = InitFromConfig(vision_tower="random", connector="random", language_model="random")
TEXT = 256  #: tokens of text of a row
PUBLISHED = {1: (4,), 2: (8,), 3: (64, 256, 512), 4: (64, 256, 512)}  #: stage -> frames
MIB, GIB = 2**20, 2**30


def demo_manifest(stage: int, checkpointing: bool) -> Manifest:
    """Return the demo's manifest of a stage, with random initial weights."""
    manifest = load_manifest(MANIFESTS / "demo" / f"stage{stage}.yaml")
    train = dataclasses.replace(manifest.train, gradient_checkpointing=checkpointing)
    return dataclasses.replace(manifest, init_from=RANDOM, train=train)


def measure_memory(stage: int, frames: int, checkpointing: bool) -> int:
    """Return the peak bytes of two steps of the demo's model; call it in a new process."""
    from framestream.trainer.distributed.preemption import PreemptionHandler
    from framestream.trainer.distributed.process_group import destroy_process_group, init_process_group
    from framestream.trainer.distributed.watchdog import Watchdog
    from framestream.trainer.monitoring.run_ledger import RunLedger
    from framestream.trainer.training.engine import build_engine
    from framestream.trainer.training.loop import RunContext, _global_batch

    manifest = demo_manifest(stage, checkpointing)
    batch = result_row(
        np.array([frames * TOKENS_PER_FRAME + TEXT]), np.array([frames * PATCHES]), seed=0, size=manifest.frames.size
    )
    context = init_process_group(timeout_minutes=5)
    before = process_peak()
    engine, _ = build_engine(manifest, context)
    with tempfile.TemporaryDirectory() as folder:
        ledger = RunLedger(Path(folder), 0, 1)
        run = RunContext(manifest, engine, context, Path(folder), ledger, PreemptionHandler(), Watchdog(5, context))
        for _ in range(2):
            _global_batch(run, iter([batch]))
    destroy_process_group()
    return process_peak() - before + batch.nbytes  # the row was in memory before


def estimate(manifest: Manifest, frames: int, ranks: int) -> dict[str, int]:
    """Estimate the bytes of one of ``ranks`` ranks by the trainer's formula."""
    return estimate_memory(manifest, frames, frames * TOKENS_PER_FRAME + TEXT, ranks)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[8, 64, 256, 512], help="of the demo's model")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 4], help="of the demo; 3 trains what 2 does")
    parser.add_argument("--ranks", type=int, default=32, help="of the published manifests")
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    print("| demo stage | frames | recomputing | measured, MiB | estimated | of it kept | working |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with spawn.Pool(1, maxtasksperchild=1) as pool:
        for stage in options.stages:
            for checkpointing in (False, True):
                for frames in options.frames:
                    measured = pool.apply(measure_memory, (stage, frames, checkpointing))
                    parts = estimate(demo_manifest(stage, checkpointing), frames, 1)
                    sizes = [measured, sum(parts.values()), parts["kept"], parts["working"]]
                    shown = " | ".join(f"{size / MIB:,.0f}" for size in sizes)
                    print(f"| {stage} | {frames} | {'yes' if checkpointing else 'no'} | {shown} |", flush=True)
    print(f"\n| published stage, {options.ranks} ranks | frames | states | kept | working | in all, GiB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for stage, counts in PUBLISHED.items():
        for frames in counts:
            parts = estimate(load_manifest(MANIFESTS / f"stage{stage}.yaml"), frames, options.ranks)
            sizes = " | ".join(f"{size / GIB:.1f}" for size in (*parts.values(), sum(parts.values())))
            print(f"| {stage} | {frames} | {sizes} |")


if __name__ == "__main__":
    main()
