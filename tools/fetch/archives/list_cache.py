"""Lists of members and indexes of gzip files in ``data.cache``, checked whenever they are read back.

NAME.arrow is the list of an archive and NAME.gzip its index, if it is a gzip file. NAME.json is the record of their
digests and is written last. Whatever does not agree with its digest is made again from the archive.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import read_record, write_record
from framestream.tools.common.arrow_files import write_table

VERSION = 2  #: of the lists; it is part of their names, so lists of other versions are not read

logger = logging.getLogger(__name__)


def digest(*values: object) -> str:
    """Return a file name for what is derived from ``values`` (JSON types)."""
    return hashlib.sha256(json.dumps([VERSION, *values]).encode()).hexdigest()[:32]


def cached_table(work: Path | None, name: str, schema: pa.Schema, make: Callable[[], pa.Table]) -> pa.Table:
    """Return the table ``name`` of the folder ``work``.

    The first process that needs the table writes it; others wait for the lock. Without a folder, the table is made in
    memory.

    Args:
        make: makes the table; for a gzip file it also writes the index :func:`index_path`.
    """
    if work is None:
        return make()
    table = _read_table(work, name, schema)
    if table is not None:
        return table
    work.mkdir(parents=True, exist_ok=True)
    with open(work / f"{name}.lock", "w") as lock:
        with contextlib.suppress(OSError):  # a file system without locks: the list may be made twice
            fcntl.flock(lock, fcntl.LOCK_EX)
        table = _read_table(work, name, schema, warn=False)
        if table is None:
            _remove_parts(work, name)
            index_path(work, name).unlink(missing_ok=True)
            made = make()
            _replace(work / f"{name}.arrow", lambda part: write_table(part, made))
            index = index_path(work, name)
            record = {
                "table": file_digest(work / f"{name}.arrow"),
                "index": file_digest(index) if index.is_file() else "",
            }
            _replace(_record_path(work, name), lambda part: write_record(part, record))
            table = MappedTable(work / f"{name}.arrow").table
    return table


def open_index(work: Path, name: str) -> BinaryIO | None:
    """Open the index of a gzip file; None if it is missing or damaged. A damaged one would end the process."""
    path = index_path(work, name)
    try:
        record = read_record(_record_path(work, name), _KIND, _FIX)
        return open(path, "rb") if record["index"] == file_digest(path) else None
    except (OSError, ValueError, KeyError):
        return None


def index_path(work: Path, name: str) -> Path:
    """Return the path of the index of a gzip file."""
    return work / f"{name}.gzip"


def process_path(path: Path) -> Path:
    """Return a path beside ``path`` that no other process on any machine writes.

    Locks do not work across machines on every file system, so two processes may write the same file at once.
    """
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")


_KIND, _FIX = "record of a list of members", "the archive is listed again"


def _record_path(work: Path, name: str) -> Path:
    return work / f"{name}.json"


def _read_table(work: Path, name: str, schema: pa.Schema, warn: bool = True) -> pa.Table | None:
    """Return a table that was written completely and is not damaged, or None. With ``warn``, the log names damage."""
    path = work / f"{name}.arrow"
    try:
        record = read_record(_record_path(work, name), _KIND, _FIX)
        if record["index"] and file_digest(index_path(work, name)) != record["index"]:
            raise ValueError(f"{index_path(work, name)}: damaged (its digest differs)")
        table = MappedTable(path, str(record["table"])).table
        if not table.schema.equals(schema):
            raise ValueError(f"{path}: has other columns")
        return table
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        if warn:
            text = str(error) if isinstance(error, ValueError) else f"{path}: cannot be read back ({error!r})"
            logger.warning("%s; %s", text.removesuffix(f"; {_FIX}"), _FIX)
        return None


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file beside ``path`` and rename it."""
    part = process_path(path)
    write(part)
    os.replace(part, path)


def _remove_parts(work: Path, name: str) -> None:
    """Remove unfinished files of ``name`` by killed processes of this machine. The caller holds its lock."""
    for part in work.glob(f"{name}.*.{glob.escape(platform.node())}.*"):
        part.unlink(missing_ok=True)
