"""The training loop of one stage, from its first weights or its last checkpoint to its final weights.

A global batch is a number of rows; every rank runs the same number of micro-steps, one row in each:

    for row in loader:                       the same number on every rank
        loss = engine(row)                   sum over labelled places of weight x cross entropy
        engine.backward(loss x world / W)    W: the weight of the whole global batch, known from the plan
        at the batch's last row: engine.step()

DeepSpeed averages gradients over ranks, so the factor world / W makes the gradient of a global batch that of
sum(weight x cross entropy) / W however its dialogues are packed, ordered or spread over ranks.

A row whose loss is not finite makes the whole gradient NaN, and DeepSpeed makes no step with a gradient that is not
finite, on any rank. Such a global batch is counted and its dialogues are noted; ``train.max_not_finite`` bounds them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from pipeline import build_loader
from pipeline.manifest import Manifest, plain
from trainer import checkpoint
from trainer.checks import check
from trainer.distributed import Place, barrier, start, stop
from trainer.engine import build_engine
from trainer.launch import StartError
from trainer.metrics import Meter
from trainer.model.cost import cost_coefficients
from trainer.profiling import Profiler
from trainer.run_ledger import RunLedger, not_finite_before
from trainer.stages import set_learning_rates
from trainer.tally import Tally
from trainer.weights import save as save_weights


class TrainingError(RuntimeError):
    """A run that cannot go on; one line that says why."""


def with_cost(manifest: Manifest) -> Manifest:
    """The manifest with ``batching.cost`` computed from the model where it is not given."""
    if manifest.batching.cost is not None:
        return manifest
    batching = dataclasses.replace(manifest.batching, cost=cost_coefficients(manifest))
    return dataclasses.replace(manifest, batching=batching)


def train(manifest: Manifest) -> Path:
    """Run the stage; returns the folder of its final weights. Repeating the call continues or does nothing."""
    manifest = with_cost(manifest)
    run = Path(manifest.output)
    final = run / "final"
    place = start(manifest.train.timeout_minutes)
    try:
        _check_world(manifest, place)
        if final.exists():
            if (run / "settings.json").exists():  # absent where final/ was put there by hand
                there = json.loads((run / "settings.json").read_text(encoding="utf-8"))
                checkpoint.check_settings(there, manifest, final)
            if place.first:
                print(f"{manifest.name}: already trained; final weights are in {final}")
            return final
        check(manifest, place, run)
        if not place.first:
            barrier()  # rank 0 opens the shards first and leaves the token cache for the others
        loader = build_loader(manifest, place.rank, place.world)
        if place.first:
            barrier()
        engine, model = build_engine(manifest, place)
        state = checkpoint.load(engine, run, manifest, place)
        done, ledger = 0, RunLedger(run, place.rank)
        if state is not None:
            loader.load_state_dict(state["loader"])
            ledger.go_on(state["loader"])
            done = state["step"]
        elif place.first:
            ledger.begin(loader.left_out(), loader.cut())
        else:
            ledger.begin()
        if place.first:
            settings = json.dumps(checkpoint.settings(manifest), indent=1)
            checkpoint.write_atomically(run / "settings.json", settings)
            checkpoint.write_atomically(run / "manifest.yaml", yaml.safe_dump(plain(manifest), sort_keys=False))
        _steps(manifest, engine, loader, place, run, ledger, done)
        _finish(model, manifest, run, place)
        if place.first:
            print(f"{manifest.name}: final weights are in {final}")
        return final
    finally:
        stop()


def steps_in_all(manifest: Manifest, batches_per_epoch: int) -> int:
    """Optimiser steps of the whole run."""
    steps = manifest.train.epochs * batches_per_epoch
    return steps if manifest.train.max_steps is None else min(steps, manifest.train.max_steps)


def _steps(manifest: Manifest, engine, loader, place: Place, run: Path, ledger: RunLedger, done: int) -> None:
    """All optimiser steps from ``done`` on, with logs and checkpoints."""
    steps = steps_in_all(manifest, len(loader))
    meter = Meter(run, manifest.name, done, steps) if place.first else None
    profiler = Profiler(run, manifest.train, steps) if place.first else None
    not_finite = not_finite_before(run, loader.state_dict()) if done else 0
    rows = _rows(loader, manifest.train.epochs)
    while done < steps:
        if profiler:
            profiler.before(done + 1)
        rates = set_learning_rates(engine.optimizer, done, steps, manifest)
        record = _global_batch(engine, rows, place, ledger, manifest)
        not_finite += not record.pop("learned")
        record["not_finite"] = not_finite
        done += 1
        if profiler:
            profiler.after(done)
        if meter and (done % manifest.train.log_every == 0 or done == steps):
            meter.write({"step": done, "steps": steps, "lr": rates, **record})
        elif meter:
            meter.bar.update()
        if not_finite > manifest.train.max_not_finite:
            raise TrainingError(
                f"{not_finite} global batches had a loss or gradient that is not finite, more than "
                f"train.max_not_finite ({manifest.train.max_not_finite}); their dialogues are in {ledger.folder}; "
                "leave those out, or lower the learning rate"
            )
        if done % manifest.train.save_every == 0 or done == steps:
            checkpoint.save(engine, run, done, loader.state_dict(), manifest, place)
    if meter:
        meter.close()


def _rows(loader, epochs: int) -> Iterator:
    """Every row of this rank until the last epoch's end."""
    while loader.state_dict()["epoch"] < epochs:
        yield from loader


def _global_batch(engine, rows: Iterator, place: Place, ledger: RunLedger, manifest: Manifest) -> dict:
    """One optimiser step: every micro-step of a global batch, then the update.

    Returns what the log shows, and ``learned``: whether loss and gradient were finite; if not, nothing was updated.
    """
    tally = Tally(manifest, place)
    while True:
        row = next(rows)
        tally.arrived()
        torch.manual_seed(row_seed(manifest.seed, row.epoch, row.step, row.micro * place.world + place.rank))
        loss = engine(row.to(place.device))
        engine.set_gradient_accumulation_boundary(row.last)
        engine.backward(loss * torch.where(loss.detach().isfinite(), place.world / row.total_weight, torch.nan))
        ledger.note(row.skipped, row.epoch, row.step)
        tally.add(row, loss.detach())
        if row.last:
            break
        tally.asked()
    tally.over_ranks()
    if not tally.dialogues:
        raise TrainingError(f"no dialogue of a global batch could be read; the reasons are in {ledger.folder}")
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


def row_seed(seed: int, epoch: int, step: int, row: int) -> int:
    """Seed of what is drawn while a row is computed (drop path): a resumed run draws what it would have drawn."""
    digest = hashlib.sha256(f"{seed}:{epoch}:{step}:{row}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _finish(model, manifest: Manifest, run: Path, place: Place) -> None:
    """Write the final weights under a temporary name, then put them in place."""
    part = run / "final.part"
    if place.first:
        shutil.rmtree(part, ignore_errors=True)
    barrier()
    save_weights(model, part, manifest)
    barrier()
    if place.first:
        part.rename(run / "final")
    barrier()


def _check_world(manifest: Manifest, place: Place) -> None:
    multiple = manifest.batching.row_multiple
    if multiple % place.world:
        raise StartError(
            f"batching.row_multiple: {multiple} is not a multiple of the {place.world} ranks; change one of them",
            everywhere=True,
        )
