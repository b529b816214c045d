"""Save checkpoints of a run: ZeRO shards, the loader's position and the settings they belong to.

    RUN/checkpoints/step-000100/     DeepSpeed's files, and state.json
    RUN/checkpoints/latest           the name of the newest complete checkpoint
    RUN/checkpoints/best             that of the best validation, which is kept however old it is

A checkpoint is written under a temporary name. Each rank syncs its own files, because rank 0 cannot sync those that
another machine wrote. Then the checkpoint is renamed, ``best`` and ``latest`` are replaced, and old checkpoints are
removed. So a run killed at any moment finds either the new checkpoint or the one before, and its best one. Frozen
parameters are not saved: they come from ``init_from`` again. Random numbers need no state: they are functions of the
seed and the position in the epoch (:mod:`framestream.trainer.training.drop_path_rng`), on any number of ranks.
state.json has the digest of every file, which the rank that wrote the file computes.
:mod:`framestream.trainer.checkpoint.load` reads checkpoints.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.pipeline.utils.command_line import describe_os_error
from framestream.pipeline.utils.differences import describe_changes
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import RecordError, read_record, write_record
from framestream.trainer.checkpoint.disk_usage import check_free, checkpoint_bytes
from framestream.trainer.checkpoint.state import (
    CheckpointError,
    best_checkpoint,
    checkpoint_name,
    rank_of_file,
    write_pointer,
)
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_sum, barrier, gather_objects

logger = logging.getLogger(__name__)

#: manifest fields that may differ between a checkpoint and the run that resumes from it
MUTABLE_FIELDS = {
    "name",
    "output",
    "shards",
    "data.roots",
    "data.decoder",
    "data.hwaccel",
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
    "train.trackers",
    "train.tracker_project",
    "train.compile",
    "train.matmul_precision",
    "train.gradient_checkpointing",
    "train.persistence_threshold",
    "model.vision_tower.group_tokens",
    "model.vision_tower.group_clips",  # of checkpoints of earlier versions
}

COST = "batching.cost."  #: fields that are computed from the model where the manifest does not state them


class WriteError(CheckpointError):
    """This rank could not write its part of a checkpoint. Other ranks may not have failed."""


def checkpoint_settings(manifest: Manifest) -> dict[str, object]:
    """Return the settings that a resumed run must share with its checkpoint, as ``field.field`` -> value."""
    return {name: value for name, value in _flatten(to_dict(manifest)) if not _is_mutable(name)}


def write_settings(path: Path, manifest: Manifest) -> None:
    """Write RUN/settings.json, a record."""
    write_record(path, checkpoint_settings(manifest))


def read_settings(path: Path) -> dict[str, object]:
    """Return RUN/settings.json.

    Raises:
        CheckpointError: it is damaged.
    """
    fix = "if the manifest is the one that the run was trained with, remove this file"
    try:
        return read_record(path, "list of settings", fix)
    except RecordError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{describe_os_error(error)}; {fix}") from None


def check_settings(saved: dict[str, object], manifest: Manifest, path: Path) -> None:
    """Check that the manifest has the settings ``saved`` with the checkpoint or the final weights at ``path``.

    Raises:
        CheckpointError: names up to three fields that differ. ``batching.cost`` may follow from others, and is named
            only if they are equal.
    """
    now, words = checkpoint_settings(manifest), ("saved", "now")
    saved = {name: value for name, value in saved.items() if not _is_mutable(name)}
    before, after = ({name: kept[name] for name in kept if not name.startswith(COST)} for kept in (saved, now))
    if shown := describe_changes(before, after, words) or describe_changes(saved, now, words):
        raise CheckpointError(
            f"{path}: created with other settings ({shown}); "
            f"restore them, remove {manifest.output}, or set another output"
        )


def raise_write_error(reason: str, context: DistributedContext) -> None:
    """Raise on every rank if one has a ``reason``. Pass an empty text where there is no reason.

    Raises:
        CheckpointError: with the reason of this rank, if it has one.
    """
    if all_reduce_sum([float(bool(reason))], context)[0]:
        raise CheckpointError(reason or "another rank failed; its message says why")


def save_checkpoint(
    engine,
    run: Path,
    step: int,
    loader_state: dict,
    manifest: Manifest,
    context: DistributedContext,
    validation: dict | None = None,
) -> None:
    """Write checkpoint ``step``, the number of completed optimizer steps. All ranks call this and return together.

    Args:
        validation: state of the validations, of a run that has them. The checkpoint of its best step is kept.

    Raises:
        CheckpointError: the disk has no room. Nothing was written.
        WriteError: a file could not be written. The previous checkpoint stays the newest.
    """
    folder = run / "checkpoints"
    name, part = checkpoint_name(step), f"part-{step:06d}"
    reason = ""
    if context.is_main:
        _sweep(folder)
        (folder / part).mkdir(parents=True)
        reason = check_free(folder, checkpoint_bytes(manifest))
    raise_write_error(reason, context)
    try:
        engine.save_checkpoint(str(folder), tag=part, save_latest=False, exclude_frozen_parameters=True)
    except (OSError, RuntimeError) as error:
        if not _is_file_error(error):
            raise
        fault = str(error).strip().split("\n")[0]
        raise WriteError(f"{folder / part}: rank {context.rank} cannot write its part ({fault}); make room") from error
    barrier()
    digests = _sync_files(folder / part, context)
    if context.is_main:
        state = {
            "step": step,
            "world": context.world,
            "loader": loader_state,
            "settings": checkpoint_settings(manifest),
            "files": {path.name: path.stat().st_size for path in sorted((folder / part).iterdir())},
            "digests": digests,
        }
        best_step = validation["best_step"] if validation else 0
        write_record(folder / part / "state.json", state if validation is None else {**state, "validation": validation})
        _publish(folder, part, name, step, manifest.train.keep_last, checkpoint_name(best_step) if best_step else "")
        logger.info("%s: saved checkpoint %s", manifest.name, folder / name)
    barrier()


def _is_file_error(error: Exception) -> bool:
    """Whether an error is about a file and not about a lost rank. torch raises RuntimeError for both."""
    return not isinstance(error, RuntimeError) or "inline_container" in str(error) or "PytorchStream" in str(error)


def _sync_files(folder: Path, context: DistributedContext) -> dict[str, str]:
    """Sync every file of a checkpoint and return its digest. Each rank does this for its own files.

    Raises:
        CheckpointError: on every rank, if one cannot read or sync its files.
    """
    own, fault = {}, ""
    try:
        for path in sorted(folder.iterdir()):
            if rank_of_file(path.name, context.world) == context.rank:
                fsync_path(path)
                own[path.name] = file_digest(path)
    except OSError as error:
        fault = describe_os_error(error)
    gathered = gather_objects((own, fault), context)
    if faults := [fault for _, fault in gathered if fault]:
        raise CheckpointError(f"{faults[0]}; the checkpoint cannot be completed, the one before stays the newest")
    return {name: digest for digests, _ in gathered for name, digest in digests.items()}


def _publish(folder: Path, part: str, name: str, step: int, keep_last: int, best: str) -> None:
    """Rename a checkpoint to its final name, point ``latest`` to it, and remove the oldest ones but ``best``."""
    for path in (folder / part / "state.json", folder / part):
        fsync_path(path)
    if (folder / name).exists():  # written by a run that was killed before it updated ``latest``
        os.replace(folder / name, folder / f"{part}-old")
    os.replace(folder / part, folder / name)
    fsync_path(folder)
    if best:
        write_pointer(folder / "best", best)
    write_pointer(folder / "latest", name)
    _sweep(folder)
    best = best or best_checkpoint(folder.parent)  # of a part of the run that was validated
    checkpoints = sorted((path for path in folder.glob("step-*") if _step(path) <= step), key=_step)
    for old in checkpoints[:-keep_last]:
        if old.name != best:
            shutil.rmtree(old, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _sweep(folder: Path) -> None:
    """Remove the files of runs that were killed while they wrote or converted a checkpoint."""
    for path in (*folder.glob("part-*"), folder / "universal"):
        shutil.rmtree(path, ignore_errors=True)


def _flatten(value: dict, prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for name, item in value.items():
        pairs += _flatten(item, f"{prefix}{name}.") if isinstance(item, dict) else [(prefix + name, item)]
    return pairs


def _is_mutable(name: str) -> bool:
    return any(name == field or name.startswith(field + ".") for field in MUTABLE_FIELDS)
