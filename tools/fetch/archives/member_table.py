"""The members of archives in one sorted table, read through a memory map.

An archive may have millions of members, and many processes look them up. The members are therefore stored in one Arrow
file, which is written once, and a name is found by binary search. A process holds only the pages that it touches.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.tools.common.near_names import near_names
from framestream.tools.fetch.archives.member_names import other_spellings, plain_path

BATCH_ROWS = 1 << 16
MAX_LINK_CHAIN = 8  #: links to links that are followed
MAX_NAME = 1 << 14  #: bytes of a name; a path of an annotation file is not longer

_MAX_LISTED = 1000  # members of a folder that are compared with a missing name
_MAX_SEARCHED = 100_000  # members of archives whose other folders are searched for a missing name

#: Members that exist but are not returned: the ledger's reason, and the message.
REFUSALS = {
    "encrypted": ("unsupported", "is encrypted; unpack the archive with its password and name the folder"),
    "method": ("unsupported", "is compressed by an unsupported method; pack the archive again"),
    "sparse": ("unsupported", "is stored as a sparse file; pack the archive again without --sparse"),
    "special": ("unsupported", "is not a regular file (a device, a pipe or similar)"),
    "dangling": ("missing_file", "is a link whose target is not in the archive"),
    "outside": ("outside_root", "is a link that leads out of the archive"),
    "ambiguous": (
        "bad_media",
        "several members have this name in other spellings (encoding, Unicode form, backslashes); rename them",
    ),
    "cut": ("truncated", "the archive ends or breaks within this member or right after it; fetch the archive again"),
}

#: Values of ``ArchiveMember.method`` other than those of the zip format: stored uncompressed in the archive, stored
#: uncompressed in the contents of a gzip file, stored in a row of a parquet file, and one that nothing here reads.
PLAIN, GZIPPED, ROW, UNKNOWN_METHOD = -1, -2, -3, -4


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
    alias: bytes | None = None  #: key of the member's own name, in a row for its plain path


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
        ("link", pa.large_binary()),
        ("alias", pa.large_binary()),
    ]
)


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


def _key_path(key: bytes) -> str:
    """Return the path of a key."""
    folder, _, name = key.decode("utf-8", "surrogateescape").rpartition("\0")
    return f"{folder}/{name}" if folder else name


def make_table(members: Iterable[tuple[str, ArchiveMember]], name: str, notes: list[str]) -> pa.Table:
    """Return the table of one archive.

    Members are listed by their names, and by their plain paths where these differ. Such a row is an alias.

    Args:
        members: (path, member) in the order of the archive. Of equal paths the last one counts, as in unpacking.
        name: of the archive, for notes.
        notes: problems of the archive, stored with the table. They are read after the members.
    """
    rows, batches = _rows(members, name, notes), []
    while batch := list(islice(rows, BATCH_ROWS)):
        columns = zip(*batch, strict=True)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        batches.append(pa.record_batch(arrays, schema=SCHEMA))
    table = pa.Table.from_batches(batches, SCHEMA)
    return _choose_last(table).replace_schema_metadata({"notes": json.dumps(notes)})


def _rows(members: Iterable[tuple[str, ArchiveMember]], name: str, notes: list[str]) -> Iterator[tuple[object, ...]]:
    """Yield the rows of members and aliases."""
    too_long = 0
    for path, member in members:
        key = member_key(path)
        if len(key) > MAX_NAME:
            too_long += 1
            continue
        yield key, *member
        plain = path if member.method == ROW else plain_path(path)
        if plain is not None and plain != path:
            yield member_key(plain), *member._replace(alias=key)
    if too_long:
        notes.append(f"{name}: {too_long} names are longer than {MAX_NAME} bytes, and cannot be asked for")


def _choose_last(table: pa.Table) -> pa.Table:
    """Return the table sorted by key, with one row of each key: the last member, or else the only alias.

    Aliases of different members are one row, which is refused.
    """
    is_alias = pc.is_valid(table["alias"])
    if not pc.any(is_alias).as_py():
        return _sort_unique(table, last=True)
    order = pc.sort_indices(
        pa.table([table["key"], is_alias, pa.array(range(len(table)))], ["key", "is_alias", "row"]),
        sort_keys=[("key", "ascending"), ("is_alias", "descending"), ("row", "ascending")],
    )
    table = table.take(order).combine_chunks()
    keys, aliases = table["key"], table["alias"]
    if len(table) > 1:
        is_new = np.append(True, pc.not_equal(keys[1:], keys[:-1]).to_numpy())
        differs = pc.fill_null(pc.not_equal(aliases[1:], aliases[:-1]), False).to_numpy() & ~is_new[1:]
        group = np.cumsum(is_new)
        is_last = np.append(is_new[1:], True)
        ambiguous = np.isin(group, group[1:][differs]) & is_last & pc.is_valid(aliases).to_numpy()
        refusals = pc.if_else(pa.array(ambiguous), "ambiguous", table["refusal"])
        table = table.set_column(table.schema.get_field_index("refusal"), SCHEMA.field("refusal"), refusals)
        table = table.filter(pa.array(is_last))
    return table


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
        self._aliases = table["alias"]
        self.notes = _notes(table)  #: problems of the archives

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, path: str) -> ArchiveMember | None:
        """Return the member at ``path``, or the target of a link there; None if it does not exist.

        A member of exactly this name counts. Without one, its other spellings are tried; several members that differ
        are returned as one with a refusal.
        """
        found = {}
        for spelling in chain([path], other_spellings(path)):
            try:
                member = self._find(member_key(spelling))
            except UnicodeEncodeError:
                return None
            if member is not None:
                found[member.archive, member.offset, member.link] = member
                if spelling == path:
                    break
        if not found:
            return None
        first = next(iter(found.values()))
        return self._follow(first) if len(found) == 1 else first._replace(refusal="ambiguous")

    def list_folder(self, folder: str) -> Iterator[tuple[str, ArchiveMember]]:
        """Yield name and member of everything directly in ``folder``, in the order of names.

        Other spellings of the folder are tried as by :meth:`get`.
        """
        listed = self._list(folder)
        first = next(listed, None)
        if first is not None:
            yield first
            yield from listed
        elif not folder.startswith("\0"):
            found = [list(self._list(spelling)) for spelling in other_spellings(folder)]
            folders = {tuple((member.archive, member.offset) for _, member in items): items for items in found if items}
            for name, member in chain.from_iterable(folders.values()):
                yield name, member if len(folders) == 1 else member._replace(refusal="ambiguous")

    def similar(self, path: str) -> str:
        """Return names that are near a missing path, for messages; see :func:`near_names`."""
        folder, _, name = path.rpartition("/")
        try:
            beside = [name for name, _ in islice(self._list(folder), _MAX_LISTED)]
        except UnicodeEncodeError:
            return ""
        if beside:
            return near_names(name, beside)
        if len(self) <= _MAX_SEARCHED:
            ends = pc.ends_with(self._keys, member_key(name))
            if elsewhere := [_key_path(key) for key in self._keys.filter(ends)[:_MAX_LISTED].to_pylist()]:
                return near_names(name, elsewhere)
        return near_names(path, map(_key_path, self._keys[:_MAX_LISTED].to_pylist()))

    def _list(self, folder: str) -> Iterator[tuple[str, ArchiveMember]]:
        """Yield name and member of everything directly in ``folder``, spelled so; each once."""
        try:
            prefix = member_key(f"{folder}/" if folder else "")
        except UnicodeEncodeError:
            return
        for row in range(self._first_row(prefix), len(self)):
            key = self._keys[row].as_py()
            if not key.startswith(prefix):
                return
            alias = self._aliases[row].as_py()
            if alias is None or not alias.startswith(prefix):  # else it is listed by its own name
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
