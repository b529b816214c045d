"""The folder of an export: one root in one format, one process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from framestream.pipeline.utils.locks import lock_folder
from framestream.pipeline.utils.records import read_record, write_record

RECORD = "export.json"  #: what the folder is an export of
LOCK = ".export.lock"


class DatasetExportError(ValueError):
    """A root cannot be exported; one line that names the folder or the field, and the fix."""


@contextlib.contextmanager
def export_folder(folder: Path, identity: Mapping[str, str]) -> Iterator[None]:
    """Lock the folder of an export, which is created, and write down what it is.

    Args:
        folder: empty or missing, or with an earlier try of the same export.
        identity: what makes two exports the same.

    Raises:
        DatasetExportError: the folder has other files, or another export.
        LockError, RecordError: another process exports into it, or it cannot be used.
    """
    with lock_folder(folder, LOCK, "export"):
        try:
            _claim(folder, identity)
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)


def _claim(folder: Path, identity: Mapping[str, str]) -> None:
    record = folder / RECORD
    if record.exists():
        found = read_record(record, "record of an export", "choose another folder", has_digest=True)
        different = [name for name in identity if found.get(name) != identity[name]]
        if different:
            what = f"format {found.get('format')}" if "format" in different else "other shards"
            raise DatasetExportError(f"{folder}: has an export of {what}; choose another folder")
        return
    if others := sorted(path.name for path in folder.iterdir() if path.name not in (LOCK, f"{RECORD}.tmp")):
        raise DatasetExportError(f"{folder}: has {others[0]!r:.100}, which no export wrote; choose an empty folder")
    write_record(record, identity)
