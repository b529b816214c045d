"""Checkpoints of a run: ZeRO shards, the loader's place and the settings they belong to.

    RUN/checkpoints/step-000100/     DeepSpeed's files, and state.json: step, loader state, settings
    RUN/checkpoints/latest           the name of the newest whole checkpoint

A checkpoint is written under a temporary name, synced and renamed; ``latest`` is replaced after that. So a run killed
at any moment finds either the new checkpoint or the one before. Frozen parameters are left out: they come from
``init_from`` again. DeepSpeed's own files are read only from the run's folder.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch

from pipeline.files import sync
from pipeline.manifest import Manifest, plain
from trainer.distributed import Place, barrier
from trainer.weight_files import Stored

#: fields of the manifest that may differ between a checkpoint and the run that goes on from it
FREE = {
    "name",
    "output",
    "shards",
    "data.roots",
    "loader",
    "evaluate",
    "train.save_every",
    "train.keep_last",
    "train.log_every",
    "train.max_not_finite",
    "train.peak_tflops",
    "train.profile_step",
    "train.profile_steps",
    "train.timeout_minutes",
    "train.gradient_checkpointing",
    "train.persistence_threshold",
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be continued; one line that says why and what to do."""


def settings(manifest: Manifest) -> dict[str, object]:
    """The flat ``field.field`` -> value settings that a resumed run must share with its checkpoint."""
    return {name: value for name, value in _flat(plain(manifest)) if not _free(name)}


def check_settings(then: dict[str, object], manifest: Manifest, made: Path) -> None:
    """Refuse to go on with ``made``, which was made with the settings ``then``, under other ones.

    Raises:
        CheckpointError: names up to three fields that differ.
    """
    now = settings(manifest)
    differing = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    if differing:
        shown = ", ".join(f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in differing[:3])
        raise CheckpointError(
            f"{made}: made with other settings ({shown}); restore them, remove {manifest.output}, or set another output"
        )


def save(engine, run: Path, step: int, loader_state: dict, manifest: Manifest, place: Place) -> None:
    """Write checkpoint ``step`` (optimiser steps done). Every rank calls this; all leave together."""
    folder = run / "checkpoints"
    name, part = f"step-{step:06d}", f"part-{step:06d}"
    if place.first:
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir(parents=True)
    barrier()
    engine.save_checkpoint(str(folder), tag=part, save_latest=False, exclude_frozen_parameters=True)
    barrier()
    if place.first:
        state = {"step": step, "world": place.world, "loader": loader_state, "settings": settings(manifest)}
        (folder / part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in sorted((folder / part).rglob("*")):
            sync(path)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(folder / part, folder / name)
        sync(folder)
        write_atomically(folder / "latest", name)
        _prune(folder, name, manifest.train.keep_last)
    barrier()


def latest(run: Path) -> Path | None:
    """Folder of the newest whole checkpoint of a run, or None."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    folder = pointer.parent / Path(pointer.read_text(encoding="utf-8").strip()).name
    if not (folder / "state.json").exists():
        raise CheckpointError(f"{pointer}: names {folder.name}, which is not there; remove {pointer} to start anew")
    return folder


def load(engine, run: Path, manifest: Manifest, place: Place) -> dict | None:
    """Continue from the newest checkpoint: loads the engine, returns ``state.json``, or None where there is none.

    Raises:
        CheckpointError: the checkpoint belongs to other settings or to another number of ranks.
    """
    folder = latest(run)
    if folder is None:
        return None
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    check_settings(state["settings"], manifest, folder)
    if state["world"] != place.world:
        raise CheckpointError(
            f"{folder}: made by {state['world']} ranks, this run has {place.world}; start it with {state['world']}"
        )
    path, _ = engine.load_checkpoint(
        str(folder.parent), tag=folder.name, load_module_strict=False, load_lr_scheduler_states=False
    )
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint files there; remove the folder")
    return state


def trained_weights(folder: Path) -> dict[str, Stored]:
    """The trained parameters of a checkpoint of any number of ranks: our names -> float32, read when wanted.

    Under ZeRO-3 the ranks' files stay on the disk and one parameter at a time is joined; under ZeRO-1 and 2 all are
    joined at once, in float32.

    Raises:
        CheckpointError: files that are missing, damaged, or hold anything but tensors and settings.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint  # only an export needs it

    silent = io.StringIO()
    try:
        with _tensors_only(), contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            tensors = get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name, exclude_frozen_parameters=True, lazy_mode=True
            )
    except UnpicklingError as error:
        fault = "its files are damaged, or hold more than tensors and settings"
        raise CheckpointError(f"{folder}: cannot be read: {fault}; take another checkpoint of the run") from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{folder}: cannot be read ({reason}); take another checkpoint of the run") from error
    return {name: Stored(tuple(tensor.shape), tensor.contiguous) for name, tensor in tensors.items()}


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


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step, synced to disk."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints, and remains of interrupted ones."""
    whole = sorted(path for path in folder.glob("step-*") if path.name <= newest)
    for path in [*whole[:-keep], *folder.glob("part-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _flat(value: dict, prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, item in value.items():
        pairs += _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return pairs


def _free(name: str) -> bool:
    return any(name == free or name.startswith(free + ".") for free in FREE)
