"""Reading checkpoints: a run that goes on, on the same or another number of ranks, and an export.

The same number of ranks reads DeepSpeed's files as they are. For another one, rank 0 turns them into DeepSpeed's
universal form, which is removed once all ranks have read it:

    RUN/checkpoints/universal/       while a run with another number of ranks starts

Files are read with nothing but tensors, plain values and three of DeepSpeed's types.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.checkpoint import disk_usage as disk
from framestream.trainer.checkpoint.save import (
    CheckpointError,
    check_settings,
    is_file_error,
    latest,
    raise_write_error,
    read_state,
)
from framestream.trainer.distributed.process_group import DistributedContext, barrier
from framestream.trainer.weights.tensor_files import LazyTensor

FAULTS = (OSError, RuntimeError, EOFError, ValueError, KeyError, AssertionError, UnpicklingError)
TICK = 0.2  #: seconds between looks for the universal form


def load_checkpoint(engine, run: Path, manifest: Manifest, place: DistributedContext) -> dict | None:
    """Continue from the newest checkpoint: loads the engine, returns ``state.json``, or None where there is none.

    Learning rate, weight decay and all else of every parameter group stay those of the manifest, whatever the
    checkpoint says. Reading the universal form under ZeRO-3, DeepSpeed 0.19 copies those of the first group onto all,
    and makes all groups share one counter of optimiser steps, which every one of them then raises.

    Raises:
        CheckpointError: it belongs to other settings, its files are damaged, or there is no room to convert it.
    """
    folder = latest(run)
    if folder is None:
        return None
    state = read_state(folder)
    check_settings(state["settings"], manifest, folder)
    groups = [{name: value for name, value in g.items() if name != "params"} for g in engine.optimizer.param_groups]
    if state["world"] == place.world:
        _load(engine, folder.parent, folder.name)
    else:
        with _universal(folder, state["world"], manifest, place) as form:
            engine._config.load_universal_checkpoint = True
            try:
                _load(engine, form, folder.name)
            finally:  # saving with it on would lose the other ranks' parts (DeepSpeed issue 7546)
                engine._config.load_universal_checkpoint = False
    for group, own in zip(engine.optimizer.param_groups, groups, strict=True):
        group.update(own)
    for moments in engine.optimizer.optimizer.state.values():
        moments["step"] = moments["step"].clone()
    return state


def _load(engine, folder: Path, tag: str) -> None:
    with _one_line(folder / tag), _tensors_only():
        path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False)
    if path is None:
        raise CheckpointError(f"{folder / tag}: DeepSpeed found no checkpoint files there; remove the folder")


@contextlib.contextmanager
def _universal(folder: Path, world: int, manifest: Manifest, place: DistributedContext) -> Iterator[Path]:
    """The folder that holds checkpoint ``folder`` of ``world`` ranks in the universal form while the block runs."""
    form, reason = folder.parent / "universal", ""
    if place.is_main:
        for path in (form, folder.parent / "part-universal"):
            shutil.rmtree(path, ignore_errors=True)
        reason = disk.check_free(folder.parent, disk.conversion_bytes(manifest, world))
    raise_write_error(reason, place)
    if place.is_main:
        print(f"{manifest.name}: {folder}: the number of ranks was {world}, is {place.world}; converting it")
        _convert(folder, folder.parent / "part-universal", form)
    while not form.exists():  # no collective call: the conversion may take longer than train.timeout_minutes
        time.sleep(TICK)
    if (form / "failed").exists():
        raise CheckpointError((form / "failed").read_text(encoding="utf-8"))
    yield form
    barrier()
    if place.is_main:
        shutil.rmtree(form)


def _convert(folder: Path, part: Path, form: Path) -> None:
    """DeepSpeed's own conversion; ``form`` appears when it is whole, or with the reason why it cannot be made."""
    from deepspeed.checkpoint.ds_to_universal import main

    part.mkdir()
    options = Namespace(
        input_folder=str(folder),
        output_folder=str(part / folder.name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    try:
        with _one_line(folder), _tensors_only(), _silence():
            main(options)
    except CheckpointError as error:
        (part / "failed").write_text(str(error), encoding="utf-8")
    os.replace(part, form)


def trained_weights(folder: Path) -> dict[str, LazyTensor]:
    """The trained parameters of a checkpoint of any number of ranks: our names -> float32, read when wanted.

    Under ZeRO-3 the ranks' files stay on the disk and one parameter at a time is joined; under ZeRO-1 and 2 all are
    joined at once, in float32.

    Raises:
        CheckpointError: files that are missing, damaged, or hold anything but tensors and settings.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # only an export needs it

    with _one_line(folder), _tensors_only(), _silence():
        tensors = get_fp32_state_dict_from_zero_checkpoint(
            str(folder.parent), tag=folder.name, exclude_frozen_parameters=True, lazy_mode=True
        )
    return {name: LazyTensor(tuple(tensor.shape), tensor.contiguous) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _one_line(folder: Path) -> Iterator[None]:
    """Turn what DeepSpeed raises over bad files into one CheckpointError."""
    try:
        yield
    except FAULTS as error:
        if not is_file_error(error):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, UnpicklingError):
            reason = "its files are damaged, or hold more than tensors and settings"
        raise CheckpointError(f"{folder}: cannot be read ({reason}); take another checkpoint of the run") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


@contextlib.contextmanager
def _tensors_only() -> Iterator[None]:
    """Let ``torch.load`` build tensors, plain values and three of DeepSpeed's types only, whatever its caller asks.

    DeepSpeed's reader would unpickle anything; a file that wants more than this is refused and nothing of it is run.
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
