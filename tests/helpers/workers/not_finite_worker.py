"""Worker for torchrun: train on global batches with and without one that is not finite. Argument: a folder.

Writes ``FOLDER/result-STAGE-OFFLOAD.json``: for each fault, whether the weights of both runs are equal bit for bit, and
the records and ledger of the first run. On the stand-in device also ``waits``: what the host waits for in the global
batches of the run without a fault. The last of them has one micro-step more, and rows with more groups of clips.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from framestream.pipeline.config.model import InitFromConfig
from framestream.trainer.distributed.process_group import barrier, destroy_process_group, init_process_group
from framestream.trainer.monitoring.run_ledger import RunLedger, read_run_ledger
from framestream.trainer.training.device_prefetch import DevicePrefetcher
from framestream.trainer.training.engine import build_engine
from framestream.trainer.training.loop import RunContext, _global_batch
from framestream.trainer.weights.load import gather_parameter
from tests.helpers.emulator import count_events
from tests.helpers.model.manifests import TRAINED, manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack

RATE = 1e-2


def main(folder: Path) -> None:
    context = init_process_group(timeout_minutes=2)
    for stage, offload in ((1, "none"), (3, "none"), (3, "optimizer")):
        without, _, waits = train(stage, offload, "none", (0, 2, 3), folder / "unused", context)
        result: dict[str, object] = {"waits": waits}
        for fault in ("loss", "gradient"):
            run = folder / f"{stage}-{offload}-{fault}"
            with_it, records, _ = train(stage, offload, fault, range(4), run, context)
            barrier()
            noted = [[row["key"], row["epoch"], row["step"], row["message"]] for row in read_run_ledger(run)]
            equal = all(torch.equal(a, b) for a, b in zip(with_it, without, strict=True))
            result[fault] = {"equal": equal, "records": records, "noted": noted}
        if context.is_main:
            (folder / f"result-{stage}-{offload}.json").write_text(json.dumps(result))
    destroy_process_group()


def train(stage: int, offload: str, fault: str, steps, folder: Path, context) -> tuple[list, list[dict], list[dict]]:
    """Train on these global batches, where number 1 has ``fault`` on rank 1; return weights, records and host waits."""
    settings = manifest(SIZE, SMALL)
    options = dataclasses.replace(
        settings.train, zero_stage=stage, offload=offload, dtype="fp32", persistence_threshold=0, vision_tower=TRAINED
    )
    first = InitFromConfig(vision_tower="random", connector="random", language_model="random")
    settings = dataclasses.replace(settings, train=options, init_from=first)
    engine, model = build_engine(settings, context)
    for group in engine.optimizer.param_groups:
        group["lr"] = RATE
    preemption = SimpleNamespace(raise_if_preempted=lambda context: None)
    watchdog = SimpleNamespace(set_phase=lambda phase: None)
    ledger = RunLedger(folder, context.rank, context.world)
    run = RunContext(settings, engine, context, folder, ledger, preemption, watchdog)
    records, waits, embed = [], [], model.embed
    for step in steps:
        faulty = step == 1 and context.rank == 1
        model.embed = (lambda batch: hurt(embed(batch))) if faulty and fault == "gradient" else embed
        micro_steps = range(2 + (step == 3))
        rows = iter([row(step, micro, context.rank, faulty and fault == "loss") for micro in micro_steps])
        with count_events() as events:
            records.append(_global_batch(run, DevicePrefetcher(rows, dict, context.device)))
        waits.append(dict(events.waits()))
    weights = []
    for parameter in model.parameters():
        with gather_parameter(parameter):
            weights.append(parameter.detach().clone())
    engine.destroy()
    return weights, records, waits


def row(step: int, micro: int, rank: int, faulty: bool):
    seed = 100 * step + 10 * micro + rank
    count = 2 + (step == 3)
    batch = pack([dialogue(seed, clips=7 if step == 3 else 1)])
    if faulty and micro == 1:
        batch.token_weight *= float("inf")  # and 0 x inf is NaN
    position = {"step": step, "micro_step": micro, "num_micro_steps": count, "is_last": micro + 1 == count}
    return dataclasses.replace(batch, **position, total_weight=2.0 * count, keys=[f"d{seed}"])


def hurt(embeddings: torch.Tensor) -> torch.Tensor:
    """Return the same values with a gradient that overflows."""
    embeddings.register_hook(lambda gradient: gradient * float("inf"))
    return embeddings


if __name__ == "__main__":
    main(Path(sys.argv[1]))
