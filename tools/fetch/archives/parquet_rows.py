"""Names by which the images in rows of parquet files are found.

Annotation files name an image ``FOLDER/ID.png``. The row that contains it has the path that it was stored with, which
may have another extension or no folder, or may be missing, and an ``id``. Each row is therefore listed under its names
without their extensions. A name becomes a folder with the rows as its files, so that two rows of one name stay two
members. Its path begins with a NUL, which no path of an annotation file contains.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice

from framestream.tools.fetch.archives.member_names import normalize_path
from framestream.tools.fetch.archives.member_table import ArchiveMember, MemberTable

MAX_SAME_NAME = 8  #: rows of one name that are compared; if there are more, none of them is returned

_PATH, _ID, _LAST_PART = "012"  # kinds of names: a path, an id, or the last part of either; sorted in this order
_MAX_NAME = 4096  # characters of a name
_MAX_CANDIDATES = 1000  # rows of one name that are looked at
#: All image extensions at the end of a name, such as ``.jpg`` or ``.png.jpg``. The lookbehind excludes a name that is
#: only an extension, such as ``a/.png``.
_EXTENSIONS = re.compile(r"(?<=[^/])(?:\.(?:jpe?g|jfif|png|gif|webp|bmp|tiff?))+$", re.I)


def row_paths(path: str | None, row_id: str | None, file_id: str, row: int) -> Iterator[str]:
    """Yield the paths under which ``row`` is listed in a member table; none if it has neither a path nor an ``id``.

    A path is ``\\0STEM/KIND FILE_ID ROW EXTENSION``.

    Args:
        path: the path that the image was stored with. An absolute one is of another machine: its last part counts.
        row_id: the row's ``id``.
        file_id: distinguishes the parquet file from others; without spaces.
    """
    names: dict[str, str] = {}
    if path and (path := _normalize(path.rpartition("/")[2] if path.startswith("/") else path)):
        stem = _strip_extensions(path)
        names[stem] = f"{_PATH} {file_id} {row} {path[len(stem) :]}"
    if row_id and (row_id := _normalize(row_id)):
        names.setdefault(_strip_extensions(row_id), f"{_ID} {file_id} {row} ")
    for stem in list(names):
        names.setdefault(stem.rpartition("/")[2], f"{_LAST_PART} {file_id} {row} ")
    return (f"\0{stem}/{key}" for stem, key in names.items())


def find_rows(members: MemberTable, path: str) -> list[ArchiveMember]:
    """Return the rows that ``path`` names, in the order of their files.

    They are the first of these groups that is not empty:

    1. rows stored with this path;
    2. rows with this path or ``id``, except for the extension;
    3. rows with the last part of this path, where either the row or ``path`` has no folder.
    """
    stem = _strip_extensions(path)
    rows = _rows_of_stem(members, stem)
    for group in (
        [member for kind, extension, member in rows if kind == _PATH and stem + extension == path],
        [member for kind, _, member in rows if kind != _LAST_PART],
        [member for _, _, member in rows],  # ``path`` has no folder: it is the last part of a name with one
        [member for kind, _, member in _rows_of_stem(members, stem.rpartition("/")[2]) if kind != _LAST_PART],
    ):
        if group:
            return sorted(group)
    return []


def _rows_of_stem(members: MemberTable, stem: str) -> list[tuple[str, str, ArchiveMember]]:
    """Return kind of name, extension and member of the rows of a name."""
    rows = []
    for key, member in islice(members.list_folder(f"\0{stem}"), _MAX_CANDIDATES):
        kind, _, _, extension = key.split(" ", 3)
        rows.append((kind, extension, member))
    return rows


def _normalize(name: str) -> str | None:
    return normalize_path(name) if len(name) <= _MAX_NAME else None


def _strip_extensions(name: str) -> str:
    return _EXTENSIONS.sub("", name)
