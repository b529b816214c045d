"""What a checkpoint says about itself, checked before any of its files is used.

    RUN/checkpoints/step-000100/state.json     step, ranks, loader state, settings, and size and digest of every file
    RUN/checkpoints/latest                     the name of the newest complete checkpoint
    RUN/checkpoints/best                       that of the best validation, if the run is validated

All are records with a digest of their own content. ``latest`` may also be just the name, as a user writes it.
Checkpoints that were written before there were digests are still read.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from framestream.pipeline.utils.command_line import describe_os_error
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import RecordError, parse_record, read_record, write_record

NAME = re.compile(r"step-(\d{6,12})")  #: of a checkpoint's folder
OWN_FILE = re.compile(r"pp_rank_(\d{1,9})_")  #: in the names of DeepSpeed's files: the rank that writes one
DICTIONARIES = ("loader", "settings", "files", "digests")  #: fields of state.json; older versions have no digests
#: fields of ``validation`` in state.json, which runs without ``evaluate.every`` do not have
VALIDATION: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "questions": int,
    "step": int,
    "scores": dict,
    "best_step": int,
    "best": (int, float, type(None)),
    "stale": int,
    "pending": (dict, type(None)),
}

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read or written. The message is one line with the reason and the fix."""


class _DamageError(ValueError):
    """Damage in a checkpoint: the file and the reason, without a fix."""


def rank_of_file(name: str, world: int) -> int:
    """Return the rank, of ``world``, that writes or checks a file of a checkpoint."""
    found = OWN_FILE.search(name)
    return int(found[1]) % world if found else 0


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a step's checkpoint."""
    return f"step-{step:06d}"


def write_pointer(pointer: Path, name: str) -> None:
    """Let ``latest`` or ``best`` name a checkpoint."""
    write_record(pointer, {"checkpoint": name})


def best_checkpoint(run: Path) -> str:
    """Return the name of the checkpoint of a run's best validation; empty without one, or if ``best`` is damaged."""
    fix = "the next validation writes it again"
    try:
        record = read_record(run / "checkpoints" / "best", "pointer to a checkpoint", fix, has_digest=True)
    except FileNotFoundError:
        return ""
    except (OSError, RecordError) as error:
        logger.warning("%s", error)
        return ""
    name = str(record.get("checkpoint"))
    return name if NAME.fullmatch(name) else ""


def latest_checkpoint(run: Path) -> Path | None:
    """Return the folder of the newest complete checkpoint of a run, or None if there is no ``latest``.

    Raises:
        CheckpointError: ``latest`` is damaged, or names no checkpoint.
    """
    pointer = run / "checkpoints" / "latest"
    fix = f"write the name of one of {pointer.parent}/step-* into it, or remove it"
    return named_checkpoint(pointer, fix, f"remove {pointer} to start from the first step")


def named_checkpoint(pointer: Path, fix: str, gone_fix: str) -> Path | None:
    """Return the folder of the checkpoint that ``latest`` or ``best`` names, or None if there is no such file.

    Args:
        pointer: the file.
        fix: what to do if it is damaged.
        gone_fix: what to do if the checkpoint does not exist.

    Raises:
        CheckpointError: the file is damaged, or names no checkpoint.
    """
    kind = "pointer to a checkpoint"
    try:
        with open(pointer, "rb") as file:
            data = file.read(1 << 16)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{describe_os_error(error)}; {fix}") from None
    name = data.strip().decode(errors="replace")
    if not NAME.fullmatch(name):
        try:
            record = parse_record(data, str(pointer), kind, fix, warn=False)
        except RecordError as error:
            raise CheckpointError(str(error)) from None
        name = str(record.get("checkpoint"))
        if record.keys() != {"checkpoint"} or not NAME.fullmatch(name):
            raise CheckpointError(f"{pointer}: not a {kind}; {fix}")
    folder = pointer.parent / name
    if not (folder / "state.json").exists():
        raise CheckpointError(f"{pointer}: names {name}, which does not exist; {gone_fix}")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint, after checking that its files are there and have their sizes.

    Raises:
        CheckpointError: names the first file that is missing or damaged, and the newest older checkpoint.
    """
    try:
        return _read_state(folder)
    except _DamageError as error:
        raise CheckpointError(f"{error}; {describe_fix(folder)}") from None


def check_files(folder: Path, state: dict[str, Any], rank: int = 0, world: int = 1) -> str:
    """Compare the files of a checkpoint with their digests.

    Args:
        folder: of the checkpoint.
        state: as :func:`read_state` returns it.
        rank: checks its share of the files.
        world: number of ranks that share them.

    Returns:
        the first file that is damaged with the reason; empty if none is.
    """
    for name, digest in state.get("digests", {}).items():
        if rank_of_file(name, world) != rank:
            continue
        try:
            if file_digest(folder / name) != digest:
                return f"{folder / name}: damaged (its digest differs)"
        except OSError as error:
            return describe_os_error(error)
    return ""


def describe_fix(folder: Path) -> str:
    """Return what to do about a damaged checkpoint: the newest older one whose files are all as they were written."""
    pointer = folder.parent / "latest"
    older = [path for path in folder.parent.glob("step-*") if 0 <= _step(path) < _step(folder)]
    for path in sorted(older, key=_step, reverse=True):
        try:
            if not check_files(path, _read_state(path)):
                return f"{path.name} is complete: write this name into {pointer} to resume from it"
        except _DamageError:
            continue
    return f"no older checkpoint is complete: remove {pointer} to start from the first step"


def _read_state(folder: Path) -> dict[str, Any]:
    """Read and check state.json.

    Raises:
        _DamageError: names the first file that is missing or damaged.
    """
    path, no_fix = folder / "state.json", "-"
    try:
        state = read_record(path, "state of a checkpoint", no_fix)
    except RecordError as error:
        raise _DamageError(str(error).removesuffix(f"; {no_fix}")) from None
    except OSError as error:
        raise _DamageError(describe_os_error(error)) from None
    if fault := _state_fault(state):
        raise _DamageError(f"{path}: not a state of a checkpoint ({fault})")
    for name, size in state["files"].items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            fault = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise _DamageError(f"{file}: {fault}")
    return state


def _state_fault(state: dict[str, Any]) -> str:
    """Return what is wrong with the fields of state.json; empty if nothing is."""
    for name, low in (("step", 0), ("world", 1)):
        if not isinstance(state.get(name), int) or not low <= state[name] < 10**9:
            return f"{name} is {state.get(name)!r:.40}"
    if unknown := state.keys() - {"step", "world", "validation", *DICTIONARIES}:
        return f"unknown field {sorted(unknown)[0]!r:.40}"
    for name in DICTIONARIES if "digests" in state else DICTIONARIES[:3]:
        if not isinstance(state.get(name), dict):
            return f"{name} is {state.get(name)!r:.40}"
    if "validation" in state and (fault := _validation_fault(state["validation"])):
        return fault
    for name, size in state["files"].items():
        if "/" in name or name in ("", ".", "..") or not isinstance(size, int):
            return f"files: {name!r:.40}"
    digests = state.get("digests")
    return "" if digests is None or digests.keys() == state["files"].keys() else "files without a digest"


def _validation_fault(validation: Any) -> str:
    if not isinstance(validation, dict) or validation.keys() != VALIDATION.keys():
        return "validation has other fields"
    for name, types in VALIDATION.items():
        if not isinstance(validation[name], types) or isinstance(validation[name], bool):
            return f"validation: {name} is {validation[name]!r:.40}"
    if min(validation["step"], validation["best_step"], validation["stale"]) < 0:
        return "validation: a number is negative"
    return "validation: best is missing" if validation["best_step"] and validation["best"] is None else ""


def _step(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder, -1 for other names."""
    found = NAME.fullmatch(checkpoint.name)
    return int(found[1]) if found else -1
