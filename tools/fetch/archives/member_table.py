"""The members of archives in one sorted table, read through a memory map.

An archive may have millions of members, and many processes look them up. The members are therefore stored in one Arrow
file, which is written once, and a name is found by binary search. A process holds only the pages that it touches.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import platform
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.tools.common.arrow_files import map_table, write_table

VERSION = 1  #: of the tables; it is part of their names, so tables of other versions are not read
BATCH_ROWS = 1 << 16
MAX_LINK_CHAIN = 8  #: links to links that are followed

#: Members that exist but are not returned: the ledger's reason, and the message.
REFUSALS = {
    "encrypted": ("unsupported", "is encrypted; unpack the archive with its password and name the folder"),
    "method": ("unsupported", "is compressed by an unsupported method; pack the archive again"),
    "sparse": ("unsupported", "is stored as a sparse file; pack the archive again without --sparse"),
    "special": ("unsupported", "is not a regular file (a device, a pipe or similar)"),
    "dangling": ("missing_file", "is a link whose target is not in the archive"),
    "outside": ("outside_root", "is a link that leads out of the archive"),
    "cut": ("truncated", "the archive ends or breaks within this member or right after it; fetch the archive again"),
}

#: Values of ``ArchiveMember.method`` other than those of the zip format: stored uncompressed in the archive, stored
#: uncompressed in the contents of a gzip file, and stored in a row of a parquet file.
PLAIN, GZIPPED, ROW = -1, -2, -3


class ArchiveMember(NamedTuple):
    """Where a member is; sizes in bytes."""

    archive: int  #: number in the list of archives
    offset: int  #: zip: of the local header; parquet: the row; otherwise of the data
    size: int  #: unpacked; UNKNOWN for parquet
    packed: int  #: within the archive
    crc: int  #: CRC-32 of the unpacked bytes; zip only
    method: int
    refusal: str = ""  #: one of REFUSALS
    link: bytes | None = None  #: key of another member, whose contents this one has


SCHEMA = pa.schema(
    [
        ("key", pa.large_binary()),  # see member_key
        ("archive", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("packed", pa.int64()),
        ("crc", pa.uint32()),
        ("method", pa.int16()),
        ("refusal", pa.string()),
        ("link", pa.binary()),
    ]
)


def normalize_path(name: str) -> str | None:
    """Return a member's name as a path relative to the archive; None if it is empty or contains ``..`` or NUL."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts or "\0" in name else "/".join(parts)


def resolve_link(path: str, target: str) -> bytes | None:
    """Return the key of the target of a symbolic link at ``path``; None if it is outside the archive."""
    parts = path.split("/")[:-1]
    for part in target.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return None if target.startswith("/") or "\0" in target or not parts else member_key("/".join(parts))


def member_key(path: str) -> bytes:
    """Return the sort key of a path: ``FOLDER NUL NAME``. The files directly in a folder then follow each other."""
    folder, _, name = path.rpartition("/")
    return f"{folder}\0{name}".encode("utf-8", "surrogateescape")


def make_table(members: Iterable[tuple[str, ArchiveMember]], notes: list[str]) -> pa.Table:
    """Return the table of one archive.

    Args:
        members: (path, member) in the order of the archive. Of equal paths the last one counts, as in unpacking.
        notes: problems of the archive, stored with the table. They are read after the members.
    """
    rows = ((member_key(path), *member) for path, member in members)
    batches = []
    while batch := list(islice(rows, BATCH_ROWS)):
        columns = zip(*batch, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        batches.append(pa.record_batch(arrays, schema=SCHEMA))
    table = pa.Table.from_batches(batches, SCHEMA)
    return _sort_unique(table, last=True).replace_schema_metadata({"notes": json.dumps(notes)})


def merge_tables(tables: list[pa.Table]) -> pa.Table:
    """Return one table of the members of several archives. Of equal paths the first archive's counts."""
    numbered = []
    for number, table in enumerate(tables):
        archive = pa.array(np.full(len(table), number, dtype=np.int32))
        numbered.append(table.set_column(1, "archive", archive).replace_schema_metadata(None))
    notes = [note for table in tables for note in _notes(table)]
    table = _sort_unique(pa.concat_tables([SCHEMA.empty_table(), *numbered]), last=False)
    return table.replace_schema_metadata({"notes": json.dumps(notes)})


def _notes(table: pa.Table) -> list[str]:
    return json.loads(table.schema.metadata[b"notes"])


def _sort_unique(table: pa.Table, last: bool) -> pa.Table:
    """Return the table sorted by key, with the first or the last row of each key."""
    order = pc.sort_indices(table, sort_keys=[("key", "ascending")])  # a stable sort: equal keys stay in their order
    table = table.take(order).combine_chunks()
    keys = table["key"]
    if len(table) > 1:
        differs = pc.not_equal(keys[1:], keys[:-1]).to_numpy()
        table = table.filter(pa.array(np.append(differs, True) if last else np.append(True, differs)))
    return table


class MemberTable:
    """Members by path."""

    def __init__(self, table: pa.Table) -> None:
        self._keys, *self._columns = table.columns
        self.notes = _notes(table)  #: problems of the archives

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, path: str) -> ArchiveMember | None:
        """Return the member at ``path``, or the target of a link there; None if it does not exist."""
        try:
            first = self._find(member_key(path))
        except UnicodeEncodeError:
            return None
        return None if first is None else self._follow(first)

    def list_folder(self, folder: str) -> Iterator[tuple[str, ArchiveMember]]:
        """Yield name and member of everything directly in ``folder``, in the order of names."""
        try:
            prefix = member_key(f"{folder}/")
        except UnicodeEncodeError:
            return
        for row in range(self._first_row(prefix), len(self)):
            key = self._keys[row].as_py()
            if not key.startswith(prefix):
                return
            yield key[len(prefix) :].decode("utf-8", "surrogateescape"), self._follow(self._member(row))

    def _follow(self, first: ArchiveMember) -> ArchiveMember:
        """Return the target of a chain of links. Without a target, return the link with a refusal."""
        member: ArchiveMember | None = first
        for _ in range(MAX_LINK_CHAIN):
            if member is None or member.link is None:
                break
            member = self._find(member.link)
        if member is None or member.link is not None:
            return first._replace(refusal="dangling")
        return member

    def _find(self, key: bytes) -> ArchiveMember | None:
        row = self._first_row(key)
        return self._member(row) if row < len(self) and self._keys[row].as_py() == key else None

    def _first_row(self, key: bytes) -> int:
        """Return the first row whose key is not less than ``key``."""
        return bisect_left(range(len(self)), key, key=lambda row: self._keys[row].as_py())

    def _member(self, row: int) -> ArchiveMember:
        return ArchiveMember(*(column[row].as_py() for column in self._columns))


# Cached tables --------------------------------------------------------------------------------------------------------


def digest(*values: object) -> str:
    """Return a file name for what is derived from ``values`` (JSON types)."""
    return hashlib.sha256(json.dumps([VERSION, *values]).encode()).hexdigest()[:32]


def cached_table(work: Path | None, name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """Return the table ``name`` of the folder ``work``.

    The first process that needs the table writes it; others wait for the lock. Without a folder, the table is made in
    memory.
    """
    if work is None:
        return make()
    path = work / f"{name}.arrow"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _remove_parts(work, name)
                part = process_path(path)
                write_table(part, make())
                os.replace(part, path)
    return map_table(path)


def process_path(path: Path) -> Path:
    """Return a path beside ``path`` that no other process on any machine writes.

    Locks do not work across machines on every file system, so two processes may write the same file at once.
    """
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")


def _remove_parts(work: Path, name: str) -> None:
    """Remove unfinished files of ``name`` by killed processes of this machine. The caller holds its lock."""
    for part in work.glob(f"{name}.*.{glob.escape(platform.node())}.*"):
        part.unlink(missing_ok=True)
