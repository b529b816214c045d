"""Load checkpoints, to resume on the same or another number of ranks, or to export.

On the same number of ranks DeepSpeed's files are read as they are. For another number, rank 0 converts them into
DeepSpeed's universal format. The result is removed once all ranks have read it:

    RUN/checkpoints/universal/       while a run starts on another number of ranks

Only tensors, plain values and three of DeepSpeed's types are unpickled.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.checkpoint.disk_usage import check_free, conversion_bytes
from framestream.trainer.checkpoint.save import check_settings, raise_write_error
from framestream.trainer.checkpoint.state import (
    CheckpointError,
    check_files,
    describe_fix,
    latest_checkpoint,
    read_state,
)
from framestream.trainer.distributed.launchers import describe_runtime_error
from framestream.trainer.distributed.process_group import (
    DistributedContext,
    barrier,
    broadcast_object,
    gather_objects,
)
from framestream.trainer.weights.tensor_files import LazyTensor
from framestream.trainer.weights.tensor_reader import READ_ERRORS

POLL_SECONDS = 0.2  #: between two checks whether the universal format is complete
MAX_WORKERS = 32  #: processes that convert a checkpoint

logger = logging.getLogger(__name__)


def load_checkpoint(engine, run: Path, manifest: Manifest, context: DistributedContext) -> dict | None:
    """Load the newest checkpoint into the engine. Return ``state.json``, or None if there is no checkpoint.

    The parameter groups keep the manifest's learning rate, weight decay and other options. DeepSpeed 0.19 loads them
    wrongly from the universal format under ZeRO-3: it copies those of the first group to all groups. It also makes all
    groups share one counter of optimizer steps, which each of them would increment.

    Raises:
        CheckpointError: its settings differ, its files are damaged, or there is no room to convert it.
    """
    found = _find_checkpoint(run, manifest, context)
    if found is None:
        return None
    folder, state = found
    groups = [{name: value for name, value in g.items() if name != "params"} for g in engine.optimizer.param_groups]
    if state["world"] == context.world:
        _load(engine, folder.parent, folder.name)
    else:
        with _universal_format(folder, state["world"], manifest, context) as universal:
            engine._config.load_universal_checkpoint = True
            try:
                _load(engine, universal, folder.name)
            finally:  # saving with this option on would lose the other ranks' parts (DeepSpeed issue 7546)
                engine._config.load_universal_checkpoint = False
    for group, options in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(options)
    separate_step_counters(engine.optimizer.optimizer)
    return state


def separate_step_counters(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a counter of optimizer steps of its own, on the device where AdamW expects it.

    Fused AdamW takes it from the device of the moments, others from the CPU. A checkpoint of another number of ranks,
    or of another kind of device, has it elsewhere.
    """
    fused = all(group["fused"] for group in optimizer.param_groups)
    for moments in optimizer.state.values():
        device = moments["exp_avg"].device if fused else torch.device("cpu")
        moments["step"] = moments["step"].to(device, copy=True)


def _find_checkpoint(run: Path, manifest: Manifest, context: DistributedContext) -> tuple[Path, dict] | None:
    """Find the newest checkpoint, and check its settings and files. Every rank calls this.

    Rank 0 decides which one that is. The ranks share the reading of the files.

    Returns:
        its folder and state, or None if there is none.

    Raises:
        CheckpointError: the same on every rank.
    """
    found, fault = None, ""
    if context.is_main:
        try:
            if newest := latest_checkpoint(run):
                found = newest, read_state(newest)
                check_settings(found[1]["settings"], manifest, newest)
        except CheckpointError as error:
            fault = str(error)
    found, fault = broadcast_object((found, fault), context)
    if found and not fault:
        folder, state = found
        faults = gather_objects(check_files(folder, state, context.rank, context.world), context)
        if fault := next(filter(None, faults), ""):
            fix = describe_fix(folder) if context.is_main else ""
            fault = f"{fault}; {broadcast_object(fix, context)}"
    if fault:
        raise CheckpointError(fault)
    return found


def _load(engine, folder: Path, tag: str) -> None:
    with _checkpoint_errors(folder / tag), _tensors_only():
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{folder / tag}: DeepSpeed found no checkpoint files there; remove the folder")


@contextlib.contextmanager
def _universal_format(folder: Path, world: int, manifest: Manifest, context: DistributedContext) -> Iterator[Path]:
    """Convert checkpoint ``folder`` of ``world`` ranks to the universal format, and remove the result afterwards."""
    universal, reason = folder.parent / "universal", ""
    if context.is_main:
        for path in (universal, folder.parent / "part-universal"):
            shutil.rmtree(path, ignore_errors=True)
        reason = check_free(folder.parent, conversion_bytes(manifest, world))
    raise_write_error(reason, context)
    if context.is_main:
        logger.info("%s: converting %s from %d to %d ranks", manifest.name, folder, world, context.world)
        _convert(folder, folder.parent / "part-universal", universal)
    while not universal.exists():  # no collective call: the conversion may take longer than train.timeout_minutes
        time.sleep(POLL_SECONDS)
    if (universal / "failed").exists():
        raise CheckpointError((universal / "failed").read_text(encoding="utf-8"))
    yield universal
    barrier()
    if context.is_main:
        shutil.rmtree(universal)


def count_workers(file_bytes: int) -> int:
    """Return the number of processes that convert a checkpoint whose largest file has ``file_bytes``.

    Meanwhile the other ranks only wait, so every core may be used. A process has one file in memory, and a copy of
    parts of it. All processes use at most half of the memory that is available.
    """
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(1, min(len(os.sched_getaffinity(0)), MAX_WORKERS, available // (4 * file_bytes)))


def _convert(folder: Path, part: Path, universal: Path) -> None:
    """Run DeepSpeed's conversion. ``universal`` appears once it is complete, or with the file ``failed``."""
    from deepspeed.checkpoint.ds_to_universal import main

    part.mkdir()
    workers = count_workers(max(path.stat().st_size for path in folder.iterdir()))
    options = Namespace(
        input_folder=str(folder),
        output_folder=str(part / folder.name),
        num_extract_workers=workers,
        num_merge_workers=workers,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with _checkpoint_errors(folder), _tensors_only(), _no_output():
            main(options)
    except CheckpointError as error:
        (part / "failed").write_text(str(error), encoding="utf-8")
    os.replace(part, universal)


def trained_weights(folder: Path) -> dict[str, LazyTensor]:
    """Return the trained parameters of a checkpoint of any number of ranks: our names -> float32, read on demand.

    Under ZeRO-3 the ranks' files stay on disk, and one parameter at a time is joined. Under ZeRO-1 and 2 all parameters
    are joined at once, in float32.

    Raises:
        CheckpointError: files are missing, damaged, or contain anything but tensors and settings.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # needed by exports only

    with _checkpoint_errors(folder), _tensors_only(), _no_output():
        tensors = get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=True, lazy_mode=True
        )
    return {name: LazyTensor(tuple(tensor.shape), tensor.contiguous) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    """Turn DeepSpeed's exceptions about bad files into a CheckpointError of one line."""
    try:
        yield
    except READ_ERRORS as error:
        if isinstance(error, RuntimeError) and describe_runtime_error(error, os.environ):
            raise  # a rank is gone or memory does not suffice: the files are not at fault
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, UnpicklingError):
            reason = "its files are damaged, or contain more than tensors and settings"
        raise CheckpointError(f"{folder}: cannot be read ({reason}); use another checkpoint of the run") from error


@contextlib.contextmanager
def _no_output() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Let ``torch.load`` build only tensors, plain values and three of DeepSpeed's types.

    DeepSpeed's reader passes ``weights_only=False``, which would unpickle anything. The environment variable overrides
    it, so that a file with other objects is refused and none of its code runs.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
