"""The members of archives in one sorted table, read through a memory map.

An archive may have millions of members and many processes look into it, so what is known about them lies in one Arrow
file, made once, and a name is found by binary search; no process holds more than the pages it touches.
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

VERSION = 1  #: of the tables; older ones are made again
BATCH_ROWS = 1 << 16
MAX_LINK_CHAIN = 8  #: links from one to the next that are followed

#: Members that are there but are not handed out: the ledger's reason, and what is wrong.
REFUSALS = {
    "encrypted": ("unsupported", "is encrypted; unpack the archive with its password and name the folder"),
    "method": ("unsupported", "is compressed in a way that is not read; pack the archive anew"),
    "sparse": ("unsupported", "is stored as a sparse file; pack the archive anew without --sparse"),
    "special": ("unsupported", "is a device, a pipe or the like"),
    "dangling": ("missing_file", "is a link to nothing in the archive"),
    "outside": ("outside_root", "is a link that leads out of the archive"),
    "cut": ("truncated", "the archive ends or breaks within this member or right behind it; fetch the archive again"),
}

#: ``Member.method`` of members that stand in the archive, or in what a gzip file unpacks to, as they are, and of those
#: in the rows of a parquet file. Others have the zip format's number.
PLAIN, GZIPPED, ROW = -1, -2, -3


class ArchiveMember(NamedTuple):
    """Where a member is; sizes in bytes."""

    archive: int  #: position in the list of archives
    offset: int  #: zip: of the local header; parquet: the row; otherwise of the data
    size: int  #: unpacked; parquet: UNKNOWN
    packed: int  #: within the archive
    crc: int  #: of the unpacked bytes; zip alone
    method: int
    refusal: str = ""  #: one of REFUSALS
    link: bytes | None = None  #: key of another member, whose contents this one has


SCHEMA = pa.schema(
    [
        ("key", pa.large_binary()),  # see key_of
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
    """A member's name as a path relative to the archive, or None where it is none: empty, with ``..`` or NUL."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    return None if not parts or ".." in parts or "\0" in name else "/".join(parts)


def resolve_link(path: str, link: str) -> bytes | None:
    """Key of the member that a symbolic link at ``path`` leads to, or None if it leads out of the archive."""
    parts = path.split("/")[:-1]
    for part in link.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part not in ("", "."):
            parts.append(part)
    return None if link.startswith("/") or "\0" in link or not parts else member_key("/".join(parts))


def member_key(path: str) -> bytes:
    """``FOLDER NUL NAME``: sorted by it, the files directly in a folder stand together."""
    folder, _, name = path.rpartition("/")
    return f"{folder}\0{name}".encode("utf-8", "surrogateescape")


def make_table(members: Iterable[tuple[str, ArchiveMember]], notes: list[str]) -> pa.Table:
    """The table of one archive from (path, member) in the archive's order; of equal paths the last one counts, as
    where an archive is unpacked. ``notes`` are read after the members, and kept with the table."""
    rows = ((member_key(path), *member) for path, member in members)
    batches = []
    while batch := list(islice(rows, BATCH_ROWS)):
        columns = zip(*batch, strict=True)
        batches.append(
            pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
        )
    table = pa.Table.from_batches(batches, SCHEMA)
    return _sorted(table, last=True).replace_schema_metadata({"notes": json.dumps(notes)})


def merge_tables(tables: list[pa.Table]) -> pa.Table:
    """One table of the members of several archives; of equal paths the first archive's counts."""
    numbered = []
    for number, table in enumerate(tables):
        archive = pa.array(np.full(len(table), number, dtype=np.int32))
        numbered.append(table.set_column(1, "archive", archive).replace_schema_metadata(None))
    notes = [note for table in tables for note in _notes(table)]
    table = _sorted(pa.concat_tables([SCHEMA.empty_table(), *numbered]), last=False)
    return table.replace_schema_metadata({"notes": json.dumps(notes)})


def _notes(table: pa.Table) -> list[str]:
    return json.loads(table.schema.metadata[b"notes"])


def _sorted(table: pa.Table, last: bool) -> pa.Table:
    """The table in the order of its keys, each once: the first or last row that has it."""
    order = pc.sort_indices(table, sort_keys=[("key", "ascending")])  # stable
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
        self.notes = _notes(table)  #: what was found wrong with the archives

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, path: str) -> ArchiveMember | None:
        """The member at ``path``, or the one that a link there leads to, or None."""
        try:
            first = member = self._find(member_key(path))
        except UnicodeEncodeError:
            return None
        for _ in range(MAX_LINK_CHAIN):
            if member is None or member.link is None:
                break
            member = self._find(member.link)
        if first is not None and (member is None or member.link is not None):
            return first._replace(refusal="dangling")
        return member

    def list_folder(self, folder: str) -> Iterator[tuple[str, ArchiveMember]]:
        """Name and member of everything directly in ``folder``, in the order of names."""
        try:
            prefix = member_key(f"{folder}/")
        except UnicodeEncodeError:
            return
        for row in range(self._row(prefix), len(self)):
            key = self._keys[row].as_py()
            if not key.startswith(prefix):
                return
            name, member = key[len(prefix) :].decode("utf-8", "surrogateescape"), self._member(row)
            yield name, member if member.link is None else self.get(f"{folder}/{name}" if folder else name)

    def _find(self, key: bytes) -> ArchiveMember | None:
        row = self._row(key)
        return self._member(row) if row < len(self) and self._keys[row].as_py() == key else None

    def _row(self, key: bytes) -> int:
        """The first row whose key is not less."""
        return bisect_left(range(len(self)), key, key=lambda row: self._keys[row].as_py())

    def _member(self, row: int) -> ArchiveMember:
        return ArchiveMember(*(column[row].as_py() for column in self._columns))


# Kept tables ----------------------------------------------------------------------------------------------------------


def digest(*facts: object) -> str:
    """A name for what was made from ``facts``."""
    return hashlib.sha256(json.dumps([VERSION, *facts]).encode()).hexdigest()[:32]


def cached_table(work: Path | None, name: str, make: Callable[[], pa.Table]) -> pa.Table:
    """The table ``name`` in the folder ``work``, made by the first process that asks for it while others wait; made
    anew in memory where ``work`` is None."""
    if work is None:
        return make()
    path = work / f"{name}.arrow"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _remove_parts(work, name)
                part = stable_name(path)
                write_table(part, make())
                os.replace(part, path)
    return map_table(path)


def stable_name(path: Path) -> Path:
    """A name beside ``path`` that no other process on any machine uses: locks do not reach over every file system."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}")


def _remove_parts(work: Path, name: str) -> None:
    """Remove what processes of this machine that were killed have left of ``name``, whose lock is held."""
    for part in work.glob(f"{name}.*.{glob.escape(platform.node())}.*"):
        part.unlink(missing_ok=True)
