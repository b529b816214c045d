"""The training loop of one stage, from its first weights or its last checkpoint to its final weights.

A global batch is a number of rows; every rank runs the same number of micro-steps, one row in each:

    for row in loader:                       the same number on every rank
        loss = engine(row)                   sum over labelled places of weight x cross entropy
        engine.backward(loss x world / W)    W: the weight of the whole global batch, known from the plan
        at the batch's last row: engine.step()

DeepSpeed averages gradients over ranks, so the factor world / W makes the gradient of a global batch that of
sum(weight x cross entropy) / W however its dialogues are packed, ordered or spread over ranks.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from framestream.pipeline import build_loader
from framestream.pipeline.config.manifest import Manifest, to_dict
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.trainer.checkpoint import disk_usage as disk
from framestream.trainer.checkpoint import load as resume
from framestream.trainer.checkpoint import save as checkpoint
from framestream.trainer.distributed.call_order import ModuleCallTracer
from framestream.trainer.distributed.launchers import LaunchError
from framestream.trainer.distributed.preemption import Preempted, PreemptionHandler
from framestream.trainer.distributed.process_group import (
    DistributedContext,
    barrier,
    destroy_process_group,
    init_process_group,
)
from framestream.trainer.distributed.watchdog import Watchdog
from framestream.trainer.model.cost import cost_coefficients
from framestream.trainer.monitoring.logger import MetricsLogger
from framestream.trainer.monitoring.profiler import Profiler
from framestream.trainer.monitoring.run_ledger import RunLedger, not_finite_before
from framestream.trainer.monitoring.step_stats import StepStats
from framestream.trainer.training.drop_path_rng import drop_path_random
from framestream.trainer.training.engine import build_engine
from framestream.trainer.training.optim import set_learning_rates
from framestream.trainer.training.preflight import run_preflight
from framestream.trainer.weights.load import save_weights as save_weights


class TrainingError(RuntimeError):
    """A run that cannot go on; one line that says why."""


@dataclass(frozen=True)
class RunContext:
    """What every step of a run has to do with, on one rank."""

    manifest: Manifest
    engine: object
    place: DistributedContext
    folder: Path
    ledger: RunLedger
    leave: PreemptionHandler
    heart: Watchdog


def resolve_cost(manifest: Manifest) -> Manifest:
    """The manifest with ``batching.cost`` computed from the model where it is not given."""
    if manifest.batching.cost is not None:
        return manifest
    batching = dataclasses.replace(manifest.batching, cost=cost_coefficients(manifest))
    return dataclasses.replace(manifest, batching=batching)


def train(manifest: Manifest) -> Path:
    """Run the stage; returns the folder of its final weights. Repeating the call continues or does nothing.

    Raises:
        Preempted: SIGTERM or SIGUSR1 came; what was trained stands in a checkpoint.
    """
    leave = PreemptionHandler()
    manifest = resolve_cost(manifest)
    folder = Path(manifest.output)
    final = folder / "final"
    place = init_process_group(manifest.train.timeout_minutes)
    heart = Watchdog(manifest.train.timeout_minutes, place)
    try:
        _check_world(manifest, place)
        if final.exists():
            if (folder / "settings.json").exists():  # absent where final/ was put there by hand
                there = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
                checkpoint.check_settings(there, manifest, final)
            if place.is_main:
                print(f"{manifest.name}: already trained; final weights are in {final}")
            return final
        heart.set_phase("checking what the run needs")
        run_preflight(manifest, place, folder)
        if place.is_main:
            print(f"{manifest.name}: {disk.describe_disk(manifest)}")
        heart.set_phase("opening the shards")
        if not place.is_main:
            barrier()  # rank 0 opens the shards first and leaves the token cache for the others
        loader = build_loader(manifest, place.rank, place.world)
        if place.is_main:
            barrier()
        heart.set_phase("making the model and its first weights")
        engine, model = build_engine(manifest, place)
        heart.set_phase("reading the last checkpoint", unhurried=True)  # converting it may take long
        state = resume.load_checkpoint(engine, folder, manifest, place)
        done, ledger = 0, RunLedger(folder, place.rank, place.world)
        if state is not None:
            loader.load_state_dict(state["loader"])
            ledger.resume(state["loader"])
            done = state["step"]
            if place.is_main:
                print(f"{manifest.name}: goes on after the checkpoint of step {done}")
        elif place.is_main:
            ledger.start(loader.left_out(), loader.cut())
        else:
            ledger.start()
        if place.is_main:
            settings = json.dumps(checkpoint.settings(manifest), indent=1)
            checkpoint.write_atomically(folder / "settings.json", settings)
            checkpoint.write_atomically(folder / "manifest.yaml", yaml.safe_dump(to_dict(manifest), sort_keys=False))
        _steps(RunContext(manifest, engine, place, folder, ledger, leave, heart), loader, done)
        heart.set_phase("writing the final weights")
        _finish(model, manifest, folder, place)
        if place.is_main:
            print(f"{manifest.name}: final weights are in {final}")
        return final
    finally:
        heart.close()
        destroy_process_group()


def total_steps(manifest: Manifest, batches_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = manifest.train.epochs * batches_per_epoch
    return steps if manifest.train.max_steps is None else min(steps, manifest.train.max_steps)


def _steps(run: RunContext, loader, done: int) -> None:
    """All optimiser steps from ``done`` on, with logs and checkpoints."""
    manifest, place = run.manifest, run.place
    steps, saved = total_steps(manifest, len(loader)), done
    if place.is_main:
        print(f"{manifest.name}: {steps} optimiser steps, in {manifest.train.epochs} epochs of {len(loader)} at most")
    meter = MetricsLogger(run.folder, manifest.name, done, steps) if place.is_main else None
    profiler = Profiler(run.folder, manifest.train, steps) if place.is_main else None
    calls = ModuleCallTracer(run.engine.module) if manifest.train.check_calls else None
    if calls:
        run.heart.call = calls.last_call
    not_finite = not_finite_before(run.folder, loader.state_dict()) if done else 0
    rows = _rows(loader, manifest.train.epochs)
    try:
        with run.leave.deferred():
            while done < steps:
                if profiler:
                    profiler.start_step(done + 1)
                rates = set_learning_rates(run.engine.optimizer, done, steps, manifest)
                record = _global_batch(run, rows)
                not_finite += not record.pop("learned")
                if calls:
                    calls.compare(place)
                done += 1
                if profiler:
                    profiler.end_step(done)
                if meter and (done % manifest.train.log_every == 0 or done == steps):
                    meter.write({"step": done, "steps": steps, "lr": rates, **record, "not_finite": not_finite})
                elif meter:
                    meter.bar.update()
                if not_finite > manifest.train.max_not_finite:
                    raise TrainingError(
                        f"{not_finite} global batches had a loss or gradient that is not finite, more than "
                        f"train.max_not_finite ({manifest.train.max_not_finite}); their dialogues are in "
                        f"{run.ledger.folder}; leave those out, or lower the learning rate"
                    )
                if done % manifest.train.save_every == 0 or done == steps:
                    _save(run, loader, done)
                    saved = done
    except Preempted:
        if done > saved:
            _save(run, loader, done)
        raise
    finally:
        if meter:
            meter.close()


def _save(run: RunContext, loader, done: int) -> None:
    run.heart.set_phase(f"saving the checkpoint of step {done}")
    checkpoint.save_checkpoint(run.engine, run.folder, done, loader.state_dict(), run.manifest, run.place)


def _rows(loader, epochs: int) -> Iterator:
    """Every row of this rank until the last epoch's end."""
    while loader.state_dict()["epoch"] < epochs:
        yield from loader


def _global_batch(run: RunContext, rows: Iterator) -> dict:
    """One optimiser step: every micro-step of a global batch, then the update.

    Returns what the log shows, and ``learned``: whether loss and gradient were finite; if not, nothing was updated.
    """
    engine, place, ledger = run.engine, run.place, run.ledger
    tally = StepStats(run.manifest, place)
    while True:
        run.leave.raise_if_preempted(place)
        tally.start_wait()
        run.heart.set_phase("waiting for data")
        row = next(rows)
        tally.end_wait()
        row.draws = drop_path_random(row, run.manifest.seed, engine.module.vision_tower.draws)
        where = f"global batch {row.step} of epoch {row.epoch}, micro-step {row.micro}"
        run.heart.set_phase(f"forward pass of {where}")
        loss = engine(row.to(place.device))
        engine.set_gradient_accumulation_boundary(row.last)
        run.heart.set_phase(f"backward pass of {where}")
        engine.backward(loss * torch.where(loss.detach().isfinite(), place.world / row.total_weight, torch.nan))
        ledger.record(row.skipped, row.epoch, row.step)
        tally.add(row, loss.detach())
        if row.last:
            break
    tally.all_reduce()
    if not tally.dialogues:
        raise TrainingError(f"no dialogue of a global batch could be read; the reasons are in {ledger.folder}")
    run.heart.set_phase(f"optimiser step of {where}")
    engine.step()
    learned = engine.was_step_applied()
    if not learned:
        ledger.not_finite(tally.not_finite(), row.epoch, row.step)
    return {
        **tally.to_dict(),
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "zero_stage": engine.zero_optimization_stage(),
        "learned": learned,
    }


def _finish(model, manifest: Manifest, folder: Path, place: DistributedContext) -> None:
    """Write the final weights under a temporary name, then put them in place."""
    part = folder / "final.part"
    if place.is_main:
        shutil.rmtree(part, ignore_errors=True)
    barrier()
    save_weights(model, part, manifest)
    barrier()
    if place.is_main:
        for path in (*part.iterdir(), part):
            fsync_path(path)
        part.rename(folder / "final")
        fsync_path(folder)
    barrier()


def _check_world(manifest: Manifest, place: DistributedContext) -> None:
    multiple = manifest.batching.row_multiple
    if multiple % place.world:
        raise LaunchError(
            f"batching.row_multiple: {multiple} is not a multiple of the {place.world} ranks; change one of them",
            everywhere=True,
        )
