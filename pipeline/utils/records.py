"""JSON files that are read back: records with a digest of their own content, and JSON of outsiders.

A record is a JSON object whose field ``digest`` is the digest of all other fields. So damage is found when a record is
read, also where the damaged text is still JSON.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.digests import bytes_digest

logger = logging.getLogger(__name__)

DIGEST = "digest"  #: name of the field
MAX_BYTES = 1 << 30  #: of a record that is read
_without_digest: set[str] = set()  # files that the log has named


class RecordError(ValueError):
    """A file that the project wrote cannot be read back; one line with the file, the reason and the fix."""


def load_json(data: bytes | str) -> Any:
    """Parse JSON of unknown origin.

    Raises:
        ValueError: invalid JSON or text, or values nested too deep.
    """
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("its values are nested too deep") from None


def read_json_lines(path: Path) -> list[tuple[int, bytes, Any]]:
    """Read a file of JSON lines: number from 1, text and value of each, without an incomplete last line.

    A line that is not JSON has the value None.

    Raises:
        OSError: the file cannot be read.
        RecordError: it is too large.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise RecordError(f"{path}: has over {MAX_BYTES:,} bytes; is it another file?")
    found: list[tuple[int, bytes, Any]] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found.append((number, line, load_json(line)))
        except ValueError:
            if number < len(lines):  # else it is incomplete, or empty
                found.append((number, line, None))
    return found


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record, completely or not at all.

    Args:
        path: of the file.
        record: values that JSON can represent; keys are written in sorted order after the digest.

    Raises:
        ValueError: a value is not finite.
    """
    fields = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    digest = json.dumps({DIGEST: _digest(json.loads(fields))}, indent=1)
    text = digest if fields == "{}" else digest.removesuffix("\n}") + "," + fields.removeprefix("{")
    write_atomic(path, (text + "\n").encode())


def read_record(path: str | Path, kind: str, fix: str, has_digest: bool = False) -> dict[str, Any]:
    """Read a record that :func:`write_record` wrote.

    Args:
        path: of the file.
        kind: what the file is, for messages: ``build record``.
        fix: what to do about a damaged file, for messages.
        has_digest: no version wrote such records without a digest.

    Returns:
        Its fields, without the digest.

    Raises:
        OSError: the file cannot be read.
        RecordError: it is damaged, or no such record.
    """
    with open(path, "rb") as file:
        return parse_record(file.read(MAX_BYTES + 1), str(path), kind, fix, has_digest=has_digest)


def parse_record(
    data: bytes, name: str, kind: str, fix: str, warn: bool = True, has_digest: bool = False
) -> dict[str, Any]:
    """Return the fields of a record that was read as bytes; ``name`` is its file for messages, see :func:`read_record`.

    Records that were written before there were digests have none. With ``warn``, the log says so once for each file.

    Raises:
        RecordError: the record is damaged, or no such record.
    """
    if len(data) > MAX_BYTES:
        raise RecordError(f"{name}: not a {kind} (over {MAX_BYTES:,} bytes); {fix}")
    try:
        record = load_json(data)
    except ValueError as error:
        reason = "empty" if not data.strip() else " ".join(str(error).split())
        raise RecordError(f"{name}: not a {kind} ({reason}); {fix}") from None
    if not isinstance(record, dict):
        raise RecordError(f"{name}: not a {kind} (no JSON object); {fix}")
    stated = record.pop(DIGEST, None)
    if stated is None:
        if has_digest:
            raise RecordError(f"{name}: damaged {kind} (it has no digest); {fix}")
        if warn:
            warn_without_digest(name)
    elif stated != _digest(record):
        raise RecordError(f"{name}: damaged {kind} (its digest differs); {fix}")
    return record


def warn_without_digest(name: str) -> None:
    """Log that the file ``name`` has no digest, once for each file."""
    if name not in _without_digest:
        _without_digest.add(name)
        logger.warning("%s: has no digest, as in older versions; damage here may go unnoticed", name)


def _digest(record: Mapping[str, Any]) -> str:
    try:
        return bytes_digest(json.dumps(record, sort_keys=True, separators=(",", ":")).encode())
    except (ValueError, RecursionError):  # such a record was never written
        return ""
