"""Training loop of a stage, from its initial weights or its last checkpoint to its final weights.

A global batch is a number of rows. Every rank runs the same number of micro-steps, one row in each:

    for row in loader:                       the same number on every rank
        loss = engine(row)                   sum over labelled tokens of weight x cross entropy
        engine.backward(loss x world / W)    W: the weight of the whole global batch, known from the plan
        at the batch's last row: engine.step()

DeepSpeed averages gradients over ranks. So the factor world / W makes the gradient of a global batch that of
sum(weight x cross entropy) / W. It does not depend on how dialogues are packed, ordered or spread over ranks.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.loader import Loader, build_loader
from framestream.pipeline.utils.atomic_io import fsync_path, write_atomic
from framestream.pipeline.utils.yaml_parser import dump_yaml
from framestream.trainer.checkpoint.disk_usage import describe_disk
from framestream.trainer.checkpoint.load import load_checkpoint
from framestream.trainer.checkpoint.save import check_settings, read_settings, save_checkpoint, write_settings
from framestream.trainer.distributed.call_order import ModuleCallTracer
from framestream.trainer.distributed.launchers import LaunchError
from framestream.trainer.distributed.preemption import Preempted, PreemptionHandler
from framestream.trainer.distributed.process_group import (
    DistributedContext,
    all_reduce_max_int,
    barrier,
    destroy_process_group,
    init_process_group,
)
from framestream.trainer.distributed.run_store import main_rank_first, open_store
from framestream.trainer.distributed.watchdog import Watchdog
from framestream.trainer.model.attention import describe_kernels
from framestream.trainer.model.cost import cost_coefficients
from framestream.trainer.model.leaf_functions import compile_leaves
from framestream.trainer.model.lora import adapted_parts
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.monitoring.logger import MetricsLogger
from framestream.trainer.monitoring.profiler import Profiler
from framestream.trainer.monitoring.run_ledger import RunLedger, not_finite_before
from framestream.trainer.monitoring.step_stats import StepStats
from framestream.trainer.monitoring.trackers import open_trackers
from framestream.trainer.training.device_prefetch import DevicePrefetcher
from framestream.trainer.training.drop_path_rng import drop_path_random, seed_dropout
from framestream.trainer.training.engine import TrainingEngine, build_engine
from framestream.trainer.training.heap import keep_freed_memory
from framestream.trainer.training.memory_plan import MemoryComparison, name_memory_errors
from framestream.trainer.training.optim import set_learning_rates
from framestream.trainer.training.preflight import compare_shards, run_preflight
from framestream.trainer.training.run_lock import lock_run
from framestream.trainer.training.validation import Validation
from framestream.trainer.weights.load import save_weights
from framestream.trainer.weights.tensor_files import TRAIN_DTYPES

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run cannot continue. The message gives the reason in one line."""


@dataclass(frozen=True)
class RunContext:
    """The parts of a run that every step uses, on one rank."""

    manifest: Manifest
    engine: TrainingEngine
    context: DistributedContext
    folder: Path
    ledger: RunLedger
    preemption: PreemptionHandler
    watchdog: Watchdog
    validation: Validation | None = None  #: with ``evaluate.every``


def resolve_cost(manifest: Manifest) -> Manifest:
    """Return the manifest with ``batching.cost`` computed from the model, unless it is given."""
    if manifest.batching.cost is not None:
        return manifest
    batching = dataclasses.replace(manifest.batching, cost=cost_coefficients(manifest))
    return dataclasses.replace(manifest, batching=batching)


def total_steps(manifest: Manifest, batches_per_epoch: int) -> int:
    """Return the optimizer steps of the whole run."""
    steps = manifest.train.epochs * batches_per_epoch
    return steps if manifest.train.max_steps is None else min(steps, manifest.train.max_steps)


def train(manifest: Manifest) -> Path:
    """Run the stage; return the folder of its final weights. Repeated calls resume, or do nothing once it is finished.

    Raises:
        Preempted: SIGTERM or SIGUSR1 arrived. All completed global batches are in a checkpoint.
    """
    precision = torch.get_float32_matmul_precision()
    with PreemptionHandler() as preemption:
        manifest = resolve_cost(manifest)
        folder = Path(manifest.output)
        context = init_process_group(manifest.train.timeout_minutes)
        if context.device.type == "cpu":
            keep_freed_memory()
        watchdog = Watchdog(manifest.train.timeout_minutes, context)
        try:
            _check_world(manifest, context)
            if _is_finished(manifest, folder, context):
                return folder / "final"
            with lock_run(folder, context):
                if not _is_finished(manifest, folder, context):  # by the run that had the lock
                    _train(manifest, folder, context, preemption, watchdog)
            return folder / "final"
        finally:
            watchdog.close()
            destroy_process_group()
            torch.set_float32_matmul_precision(precision)


def _train(
    manifest: Manifest, folder: Path, context: DistributedContext, preemption: PreemptionHandler, watchdog: Watchdog
) -> None:
    """Train from the last checkpoint, or from the first step, to the final weights."""
    torch.set_float32_matmul_precision(manifest.train.matmul_precision)
    watchdog.set_phase("checking what the run needs")
    manifest = run_preflight(manifest, context, folder)
    logger.info("%s: %s", manifest.name, describe_disk(manifest))
    loader = _open_loader(manifest, context, watchdog)
    compare_shards(loader.state_dict()["fingerprint"], context)
    ledger = RunLedger(folder, context.rank, context.world)
    validation = Validation(manifest, loader.dataset, context, ledger) if manifest.evaluate.every else None
    if validation:
        logger.info("%s: %s", manifest.name, validation.describe())
    watchdog.set_phase("creating the model and its initial weights")
    engine, model = build_engine(manifest, context)
    logger.info("%s: %s", manifest.name, _describe_attention(manifest, context))
    if manifest.train.compile:
        logger.info("%s: %s", manifest.name, compile_leaves(model, context.device.type))
    watchdog.set_phase("reading the last checkpoint", no_deadline=True)  # converting it may take long
    run = RunContext(manifest, engine, context, folder, ledger, preemption, watchdog, validation)
    done = _resume(run, loader)
    if context.is_main:
        write_settings(folder / "settings.json", manifest)
        write_atomic(folder / "manifest.yaml", dump_yaml(to_dict(manifest)).encode())
    _run_steps(run, loader, done)
    watchdog.set_phase("writing the final weights")
    _write_final(model, run)


def _describe_attention(manifest: Manifest, context: DistributedContext) -> str:
    tower, language = manifest.model.vision_tower, manifest.model.language_model
    sizes = {
        "vision tower": tower.width // tower.heads,
        "language model": language.hidden_size // language.num_attention_heads,
    }
    return describe_kernels(context.device.type, TRAIN_DTYPES[manifest.train.dtype], sizes)


def _check_world(manifest: Manifest, context: DistributedContext) -> None:
    multiple = manifest.batching.row_multiple
    if multiple % context.world:
        raise LaunchError(
            f"batching.row_multiple: {multiple} is not a multiple of the {context.world} ranks; change one of them",
            everywhere=True,
        )


def _is_finished(manifest: Manifest, folder: Path, context: DistributedContext) -> bool:
    """Return whether rank 0 sees the final weights of the run, after checking that its settings are the manifest's."""
    if not all_reduce_max_int(int(context.is_main and (folder / "final").exists()), context):
        return False
    path = folder / "settings.json"
    if path.exists():  # absent if final/ was copied there by hand
        check_settings(read_settings(path), manifest, folder / "final")
    logger.info("%s: already trained", manifest.name)
    return True


def _open_loader(manifest: Manifest, context: DistributedContext, watchdog: Watchdog) -> Loader:
    """Open the shards on rank 0 first, which writes the token cache, then on the other ranks, which read it.

    Writing it may take longer than ``train.timeout_minutes``.
    """
    watchdog.set_phase("opening the shards, after rank 0 has tokenized them", no_deadline=True)
    if context.world == 1:
        return build_loader(manifest)
    store = open_store(manifest.train.timeout_minutes)
    with main_rank_first(store, "shards", context.rank):
        watchdog.set_phase("opening the shards", no_deadline=context.is_main)
        return build_loader(manifest, context.rank, context.world)


def _resume(run: RunContext, loader: Loader) -> int:
    """Load the last checkpoint, if there is one; return the number of completed optimizer steps."""
    state = load_checkpoint(run.engine, run.folder, run.manifest, run.context)
    if state is not None:
        loader.load_state_dict(state["loader"])
        run.ledger.resume(state["loader"])
        if run.validation and "validation" in state:
            run.validation.resume(state["validation"], run.folder / "checkpoints")
        logger.info("%s: resumed from the checkpoint of step %d", run.manifest.name, state["step"])
        return state["step"]
    if run.context.is_main:
        run.ledger.start(loader.excluded(), loader.truncated())
    else:
        run.ledger.start()
    return 0


class _StepMonitor:
    """Metrics and profiler of rank 0, and the check of module calls (``train.check_calls``), around each step."""

    def __init__(self, run: RunContext, done: int, steps: int) -> None:
        self._run, self._steps = run, steps
        self._metrics: MetricsLogger | None = None
        self._profiler: Profiler | None = None
        self._tracer: ModuleCallTracer | None = None
        self.memory = MemoryComparison(run.manifest, run.context)
        if run.context.is_main:
            trackers = open_trackers(run.manifest, run.folder)
            self._metrics = MetricsLogger(run.folder, run.manifest.name, done, steps, trackers)
            self._profiler = Profiler(run.folder, run.manifest.train, steps)
        if run.manifest.train.check_calls:
            self._tracer = ModuleCallTracer(run.engine.module, run.engine.module.leaf_modules())
            run.watchdog.last_call = self._tracer.last_call

    def start_step(self, step: int) -> None:
        if self._profiler:
            self._profiler.start_step(step)

    def end_step(self, record: dict) -> None:
        """Compare the calls of a step."""
        self.memory.end_step(record["peak_memory"])
        if self._tracer:
            self._tracer.compare(self._run.context)
        if self._profiler:
            self._profiler.end_step(record["step"])

    def log(self, record: dict) -> None:
        """Log the record of a step that is one of ``train.log_every``, or was validated."""
        if self._metrics is None:
            return
        step = record["step"]
        if step % self._run.manifest.train.log_every == 0 or step == self._steps or "val_loss" in record:
            self._metrics.write(record)
        else:
            self._metrics.advance()

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()


def _run_steps(run: RunContext, loader: Loader, done: int) -> None:
    """Run all optimizer steps after the first ``done``, with validations, logs and checkpoints."""
    train, validation = run.manifest.train, run.validation
    steps, saved = total_steps(run.manifest, loader.num_batches), done
    logger.info(
        "%s: %d optimizer steps, at most %d epochs of %d global batches",
        *(run.manifest.name, steps, train.epochs, loader.num_batches),
    )
    pending = validation.best.take_pending() if validation else None
    monitor = _StepMonitor(run, done - bool(pending), steps)
    not_finite = not_finite_before(run.folder, loader.state_dict()) if done else 0
    rows = DevicePrefetcher(monitor.memory.count_rows(_rows(run, loader)), loader.state_dict, run.context.device)

    def finish_step(record: dict) -> None:
        """Validate and log a step, and save it where a checkpoint is due."""
        nonlocal saved
        if validation and validation.is_due(done, steps):
            record |= validation.run(run.engine, record, run.watchdog, run.preemption)
        monitor.log(record)
        _check_not_finite(run, record["not_finite"])
        if done % train.save_every == 0 or done == steps or (validation and validation.needs_checkpoint(done)):
            _save(run, rows, done)
            saved = done

    try:
        with run.preemption.deferred():
            if pending:  # the validation of the last step was interrupted
                finish_step(pending)
            while done < steps and not (validation and validation.best.is_over):
                monitor.start_step(done + 1)
                rates = set_learning_rates(run.engine.optimizer, done, steps, run.manifest)
                record = _global_batch(run, rows)
                not_finite += not record.pop("applied")
                done += 1
                counts = {"step": done, "steps": steps, "lr": rates}
                monitor.end_step(record := {**counts, **record, "not_finite": not_finite})
                finish_step(record)
        if validation and validation.best.is_over:
            logger.info("%s: %s", run.manifest.name, validation.describe_stop(done, steps))
    except Preempted:
        if done > saved:
            _save(run, rows, done)
        raise
    finally:
        rows.close()
        monitor.close()


def _check_not_finite(run: RunContext, count: int) -> None:
    limit = run.manifest.train.max_not_finite
    if count > limit:
        raise TrainingError(
            f"{count} global batches had a loss or gradient that is not finite, more than train.max_not_finite "
            f"({limit}); their dialogues are in {run.ledger.folder}; exclude them, or lower the learning rate"
        )


def _save(run: RunContext, rows: DevicePrefetcher, done: int) -> None:
    run.watchdog.set_phase(f"saving the checkpoint of step {done}")
    validation = run.validation.best.state_dict() if run.validation else None
    save_checkpoint(run.engine, run.folder, done, rows.state_dict(), run.manifest, run.context, validation)


def _rows(run: RunContext, loader: Loader) -> Iterator[Batch]:
    """Yield every row of this rank until the end of the last epoch, with its random numbers."""
    numbers = run.engine.module.vision_tower.num_drop_path_rands
    while loader.state_dict()["epoch"] < run.manifest.train.epochs:
        for row in loader:
            row.drop_path_rand = drop_path_random(row, run.manifest.seed, numbers)
            yield row
            del row  # the loader reuses the memory of its pixels


def _global_batch(run: RunContext, rows: DevicePrefetcher) -> dict:
    """Run one optimizer step: all micro-steps of a global batch, then the update.

    Returns the figures for the log, and ``applied``: whether loss and gradient were finite. If they were not, the
    update was skipped.
    """
    engine, context, ledger = run.engine, run.context, run.ledger
    stats = StepStats(run.manifest, context)
    dropout = any(settings.dropout for settings in adapted_parts(run.manifest.train).values())
    while True:
        run.preemption.raise_if_preempted(context)
        stats.start_wait()
        run.watchdog.set_phase("waiting for data")
        row, on_device = next(rows)
        stats.end_wait()
        where = f"global batch {row.step} of epoch {row.epoch}, micro-step {row.micro_step}"
        run.watchdog.set_phase(f"forward pass of {where}")
        if dropout:
            seed_dropout(row, run.manifest.seed, context.rank, context.world)
        with name_memory_errors(row, f"forward pass of {where}", run.manifest, context):
            loss = engine(on_device)
        engine.set_gradient_accumulation_boundary(row.is_last)
        run.watchdog.set_phase(f"backward pass of {where}")
        with name_memory_errors(row, f"backward pass of {where}", run.manifest, context):
            engine.backward(loss * torch.where(loss.detach().isfinite(), context.world / row.total_weight, torch.nan))
        ledger.record(row.skipped, row.epoch, row.step)
        stats.add(row, loss.detach())
        if row.is_last:
            break
    stats.all_reduce()
    if not stats.dialogues:
        raise TrainingError(f"no dialogue of a global batch could be read; the reasons are in {ledger.folder}")
    run.watchdog.set_phase(f"optimizer step of {where}")
    with name_memory_errors(row, f"optimizer step of {where}", run.manifest, context):
        engine.step()
    applied = engine.was_step_applied()
    if not applied:
        ledger.not_finite(stats.not_finite(), row.epoch, row.step)
    return {
        **stats.to_dict(),
        "grad_norm": float(engine.get_global_grad_norm() or 0.0),
        "zero_stage": engine.zero_optimization_stage(),
        "applied": applied,
    }


def _write_final(model: VideoLLM, run: RunContext) -> None:
    """Write the final weights under a temporary name, then rename the folder to ``final``."""
    part = run.folder / "final.part"
    if run.context.is_main:
        shutil.rmtree(part, ignore_errors=True)
    barrier()
    save_weights(model, part, run.manifest)
    barrier()
    if run.context.is_main:
        for path in (*part.rglob("*"), part):
            fsync_path(path)
        part.rename(run.folder / "final")
        fsync_path(run.folder)
    barrier()
