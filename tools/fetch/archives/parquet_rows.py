"""Names by which the pictures in the rows of parquet files are found.

Annotation files name a picture ``FOLDER/ID.png``; the row that holds it has the path that it was stored with, which may
have another extension, no folder or be missing, and an ``id``. Each row is therefore listed by its names without their
extensions, as files of folders that no path of an annotation file can lead to, so that two rows of one name stay two
members.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from framestream.tools.fetch.archives.member_table import ArchiveMember, MemberTable, normalize_path

MAX_SAME_NAME = 8  #: rows of one name that are compared; where there are more, none of them is handed out

_PATH, _ID, _PART = "012"  # what a name is: of a path, an id, or the last part of either; sorted in this order
_LONGEST = 4096  # characters of a name
_LOOKED_AT = 1000  # rows of one name
_EXTENSIONS = re.compile(r"(?<=[^/])(?:\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?))+$", re.I)


def row_paths(path: str | None, name: str | None, mark: str, row: int) -> Iterator[str]:
    """Paths under which ``row`` goes into a table of members; none where neither its path nor its ``id`` is a name.

    Args:
        path: that the picture was stored with; of an absolute one, which was on another machine, the last part counts.
        name: the row's ``id``.
        mark: what tells the file from others, without spaces.
    """
    names: dict[str, str] = {}
    if path and (path := _usable(path.rpartition("/")[2] if path.startswith("/") else path)):
        stem = _stem(path)
        names[stem] = f"{_PATH} {mark} {row} {path[len(stem) :]}"
    if name and (name := _usable(name)):
        names.setdefault(_stem(name), f"{_ID} {mark} {row} ")
    for stem in list(names):
        names.setdefault(stem.rpartition("/")[2], f"{_PART} {mark} {row} ")
    return (f"\0{stem}/{facts}" for stem, facts in names.items())


def find_rows(members: MemberTable, path: str) -> list[ArchiveMember]:
    """The rows that ``path`` names, in the order of their files.

    The first of these that there are: rows stored with this path; with this path or ``id`` but for the extension; with
    its last part alone, where either the row or ``path`` has no folder.
    """
    whole = _stem(path)
    found = _named(members, whole)
    for group in (
        [member for kind, end, member in found if kind == _PATH and whole + end == path],
        [member for kind, _, member in found if kind != _PART],
        [member for _, _, member in found],  # the path has no folder: the last part of what has one
        [member for kind, _, member in _named(members, whole.rpartition("/")[2]) if kind != _PART],
    ):
        if group:
            return sorted(group)
    return []


def _named(members: MemberTable, stem: str) -> list[tuple[str, str, ArchiveMember]]:
    """Kind of name, extension and member of the rows of a name."""
    found = []
    for facts, member in islice(members.list_folder(f"\0{stem}"), _LOOKED_AT):
        kind, _, _, end = facts.split(" ", 3)
        found.append((kind, end, member))
    return found


def _usable(name: str) -> str | None:
    return normalize_path(name) if len(name) <= _LONGEST else None


def _stem(name: str) -> str:
    return _EXTENSIONS.sub("", name)
