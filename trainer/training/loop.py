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

from pipeline import build_loader
from pipeline.config.manifest import Manifest, plain
from pipeline.utils.atomic_io import sync
from trainer.checkpoint import disk_usage as disk
from trainer.checkpoint import load as resume
from trainer.checkpoint import save as checkpoint
from trainer.distributed.call_order import CallLog
from trainer.distributed.launchers import StartError
from trainer.distributed.preemption import Leave, Preempted
from trainer.distributed.process_group import Place, barrier, start, stop
from trainer.distributed.watchdog import Heartbeat
from trainer.model.cost import cost_coefficients
from trainer.monitoring.logger import Meter
from trainer.monitoring.profiler import Profiler
from trainer.monitoring.run_ledger import RunLedger, not_finite_before
from trainer.monitoring.step_stats import Tally
from trainer.training.drop_path_rng import draw
from trainer.training.engine import build_engine
from trainer.training.optim import set_learning_rates
from trainer.training.preflight import check
from trainer.weights.load import save as save_weights


class TrainingError(RuntimeError):
    """A run that cannot go on; one line that says why."""


@dataclass(frozen=True)
class Run:
    """What every step of a run has to do with, on one rank."""

    manifest: Manifest
    engine: object
    place: Place
    folder: Path
    ledger: RunLedger
    leave: Leave
    heart: Heartbeat


def with_cost(manifest: Manifest) -> Manifest:
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
    leave = Leave()
    manifest = with_cost(manifest)
    folder = Path(manifest.output)
    final = folder / "final"
    place = start(manifest.train.timeout_minutes)
    heart = Heartbeat(manifest.train.timeout_minutes, place)
    try:
        _check_world(manifest, place)
        if final.exists():
            if (folder / "settings.json").exists():  # absent where final/ was put there by hand
                there = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
                checkpoint.check_settings(there, manifest, final)
            if place.first:
                print(f"{manifest.name}: already trained; final weights are in {final}")
            return final
        heart.doing("checking what the run needs")
        check(manifest, place, folder)
        if place.first:
            print(f"{manifest.name}: {disk.describe_disk(manifest)}")
        heart.doing("opening the shards")
        if not place.first:
            barrier()  # rank 0 opens the shards first and leaves the token cache for the others
        loader = build_loader(manifest, place.rank, place.world)
        if place.first:
            barrier()
        heart.doing("making the model and its first weights")
        engine, model = build_engine(manifest, place)
        heart.doing("reading the last checkpoint", unhurried=True)  # converting it may take long
        state = resume.load(engine, folder, manifest, place)
        done, ledger = 0, RunLedger(folder, place.rank, place.world)
        if state is not None:
            loader.load_state_dict(state["loader"])
            ledger.go_on(state["loader"])
            done = state["step"]
            if place.first:
                print(f"{manifest.name}: goes on after the checkpoint of step {done}")
        elif place.first:
            ledger.begin(loader.left_out(), loader.cut())
        else:
            ledger.begin()
        if place.first:
            settings = json.dumps(checkpoint.settings(manifest), indent=1)
            checkpoint.write_atomically(folder / "settings.json", settings)
            checkpoint.write_atomically(folder / "manifest.yaml", yaml.safe_dump(plain(manifest), sort_keys=False))
        _steps(Run(manifest, engine, place, folder, ledger, leave, heart), loader, done)
        heart.doing("writing the final weights")
        _finish(model, manifest, folder, place)
        if place.first:
            print(f"{manifest.name}: final weights are in {final}")
        return final
    finally:
        heart.close()
        stop()


def steps_in_all(manifest: Manifest, batches_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = manifest.train.epochs * batches_per_epoch
    return steps if manifest.train.max_steps is None else min(steps, manifest.train.max_steps)


def _steps(run: Run, loader, done: int) -> None:
    """All optimiser steps from ``done`` on, with logs and checkpoints."""
    manifest, place = run.manifest, run.place
    steps, saved = steps_in_all(manifest, len(loader)), done
    if place.first:
        print(f"{manifest.name}: {steps} optimiser steps, in {manifest.train.epochs} epochs of {len(loader)} at most")
    meter = Meter(run.folder, manifest.name, done, steps) if place.first else None
    profiler = Profiler(run.folder, manifest.train, steps) if place.first else None
    calls = CallLog(run.engine.module) if manifest.train.check_calls else None
    if calls:
        run.heart.call = calls.reached
    not_finite = not_finite_before(run.folder, loader.state_dict()) if done else 0
    rows = _rows(loader, manifest.train.epochs)
    try:
        with run.leave.held():
            while done < steps:
                if profiler:
                    profiler.before(done + 1)
                rates = set_learning_rates(run.engine.optimizer, done, steps, manifest)
                record = _global_batch(run, rows)
                not_finite += not record.pop("learned")
                if calls:
                    calls.compare(place)
                done += 1
                if profiler:
                    profiler.after(done)
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


def _save(run: Run, loader, done: int) -> None:
    run.heart.doing(f"saving the checkpoint of step {done}")
    checkpoint.save(run.engine, run.folder, done, loader.state_dict(), run.manifest, run.place)


def _rows(loader, epochs: int) -> Iterator:
    """Every row of this rank until the last epoch's end."""
    while loader.state_dict()["epoch"] < epochs:
        yield from loader


def _global_batch(run: Run, rows: Iterator) -> dict:
    """One optimiser step: every micro-step of a global batch, then the update.

    Returns what the log shows, and ``learned``: whether loss and gradient were finite; if not, nothing was updated.
    """
    engine, place, ledger = run.engine, run.place, run.ledger
    tally = Tally(run.manifest, place)
    while True:
        run.leave.check(place)
        tally.asked()
        run.heart.doing("waiting for data")
        row = next(rows)
        tally.arrived()
        row.draws = draw(row, run.manifest.seed, engine.module.vision_tower.draws)
        where = f"global batch {row.step} of epoch {row.epoch}, micro-step {row.micro}"
        run.heart.doing(f"forward pass of {where}")
        loss = engine(row.to(place.device))
        engine.set_gradient_accumulation_boundary(row.last)
        run.heart.doing(f"backward pass of {where}")
        engine.backward(loss * torch.where(loss.detach().isfinite(), place.world / row.total_weight, torch.nan))
        ledger.note(row.skipped, row.epoch, row.step)
        tally.add(row, loss.detach())
        if row.last:
            break
    tally.over_ranks()
    if not tally.dialogues:
        raise TrainingError(f"no dialogue of a global batch could be read; the reasons are in {ledger.folder}")
    run.heart.doing(f"optimiser step of {where}")
    engine.step()
    learned = engine.was_step_applied()
    if not learned:
        ledger.not_finite(tally.not_finite(), row.epoch, row.step)
    return {
        **tally.record(),
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "zero_stage": engine.zero_optimization_stage(),
        "learned": learned,
    }


def _finish(model, manifest: Manifest, folder: Path, place: Place) -> None:
    """Write the final weights under a temporary name, then put them in place."""
    part = folder / "final.part"
    if place.first:
        shutil.rmtree(part, ignore_errors=True)
    barrier()
    save_weights(model, part, manifest)
    barrier()
    if place.first:
        for path in (*part.iterdir(), part):
            sync(path)
        part.rename(folder / "final")
        sync(folder)
    barrier()


def _check_world(manifest: Manifest, place: Place) -> None:
    multiple = manifest.batching.row_multiple
    if multiple % place.world:
        raise StartError(
            f"batching.row_multiple: {multiple} is not a multiple of the {place.world} ranks; change one of them",
            everywhere=True,
        )
