"""Checkpoints of a run: ZeRO shards, the loader's place and the settings they belong to.

    RUN/checkpoints/step-000100/     DeepSpeed's files, and state.json: step, ranks, loader state, settings, files
    RUN/checkpoints/latest           the name of the newest whole checkpoint

A checkpoint is written under a temporary name, synced and renamed; ``latest`` is replaced after that. So a run killed
at any moment finds either the new checkpoint or the one before. Frozen parameters are left out: they come from
``init_from`` again. Random numbers need no state: all are drawn from the seed and the place in the epoch
(:mod:`framestream.trainer.training.drop_path_rng`), on any number of ranks. :mod:`framestream.trainer.checkpoint.load` reads checkpoints.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest, to_dict
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.trainer.checkpoint import disk_usage as disk
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_sum, barrier

#: fields of the manifest that may differ between a checkpoint and the run that goes on from it
MUTABLE_FIELDS = {
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
    "train.check_calls",
    "train.gradient_checkpointing",
    "train.persistence_threshold",
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be continued or written; one line that says why and what to do."""


class WriteError(CheckpointError):
    """This rank, perhaps alone, could not write its part of a checkpoint."""


def settings(manifest: Manifest) -> dict[str, object]:
    """The flat ``field.field`` -> value settings that a resumed run must share with its checkpoint."""
    return {name: value for name, value in _flat(to_dict(manifest)) if not _free(name)}


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


def raise_write_error(reason: str, place: DistributedContext) -> None:
    """Raise on every rank if one has a reason to; an empty text is none.

    Raises:
        CheckpointError: with the rank's own reason where it has one.
    """
    if all_reduce_sum([float(bool(reason))], place)[0]:
        raise CheckpointError(reason or "another rank cannot go on; it says why")


def save_checkpoint(
    engine, run: Path, step: int, loader_state: dict, manifest: Manifest, place: DistributedContext
) -> None:
    """Write checkpoint ``step`` (optimiser steps done). Every rank calls this; all leave together.

    Raises:
        CheckpointError: the disk has no room; nothing was written.
        WriteError: a file could not be written; the checkpoint before stays the newest.
    """
    folder = run / "checkpoints"
    name, part = f"step-{step:06d}", f"part-{step:06d}"
    reason = ""
    if place.is_main:
        _sweep(folder)
        (folder / part).mkdir(parents=True)
        reason = disk.check_free(folder, disk.checkpoint_bytes(manifest))
    raise_write_error(reason, place)
    try:
        engine.save_checkpoint(str(folder), tag=part, save_latest=False, exclude_frozen_parameters=True)
    except (OSError, RuntimeError) as error:
        if not is_file_error(error):
            raise
        fault = str(error).strip().split("\n")[0]
        raise WriteError(f"{folder / part}: rank {place.rank} cannot write its part ({fault}); make room") from error
    barrier()
    if place.is_main:
        _put_in_place(folder, part, name, step, loader_state, manifest, place.world)
    barrier()


def is_file_error(error: Exception) -> bool:
    """Whether an error is that of a file, and not of a peer that is gone: torch raises RuntimeError for both."""
    return not isinstance(error, RuntimeError) or "inline_container" in str(error) or "PytorchStream" in str(error)


def _put_in_place(
    folder: Path, part: str, name: str, step: int, loader_state: dict, manifest: Manifest, world: int
) -> None:
    """Give a checkpoint its name, point ``latest`` to it, remove what is too old."""
    state = {
        "step": step,
        "world": world,
        "loader": loader_state,
        "settings": settings(manifest),
        "files": {path.name: path.stat().st_size for path in sorted((folder / part).iterdir())},
    }
    (folder / part / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    for path in (*(folder / part).iterdir(), folder / part):
        fsync_path(path)
    if (folder / name).exists():  # written by a start that was killed before ``latest`` named it
        os.replace(folder / name, folder / f"{part}-old")
    os.replace(folder / part, folder / name)
    fsync_path(folder)
    write_atomically(folder / "latest", name)
    _sweep(folder)
    for old in sorted((path for path in folder.glob("step-*") if _step(path) <= step), key=_step)[
        : -manifest.train.keep_last
    ]:
        shutil.rmtree(old, ignore_errors=True)


def read_state(folder: Path) -> dict:
    """state.json of a checkpoint whose files are all there.

    Raises:
        CheckpointError: names the first file that is missing or has another size than when it was written.
    """
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for name, size in state["files"].items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            fault = "is missing" if found is None else f"has {found} bytes instead of {size}"
            pointer = folder.parent / "latest"
            raise CheckpointError(f"{path}: {fault}; write the name of another checkpoint to {pointer}, or remove it")
    return state


def latest(run: Path) -> Path | None:
    """Folder of the newest whole checkpoint of a run, or None."""
    pointer = run / "checkpoints" / "latest"
    if not pointer.exists():
        return None
    folder = pointer.parent / Path(pointer.read_text(encoding="utf-8").strip()).name
    if not (folder / "state.json").exists():
        raise CheckpointError(f"{pointer}: names {folder.name}, which is not there; remove {pointer} to start anew")
    return folder


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step, synced to disk."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    fsync_path(part)
    os.replace(part, path)
    fsync_path(path.parent)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sweep(folder: Path) -> None:
    """Remove remains of starts that were killed while they wrote or converted a checkpoint."""
    for path in (*folder.glob("part-*"), folder / "universal"):
        shutil.rmtree(path, ignore_errors=True)


def _flat(value: dict, prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, item in value.items():
        pairs += _flat(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return pairs


def _free(name: str) -> bool:
    return any(name == free or name.startswith(free + ".") for free in MUTABLE_FIELDS)
