"""The files inside zip, tar and tar.gz archives, and the pictures inside parquet files, as a source, taken one by one
without unpacking the archives.

Of an archive its directory (zip), its headers (tar) or its columns of names (parquet) are read once, in the first
process that opens it; a file then costs the bytes it has in the archive. A tar.gz is read through once, and then costs
a few MiB for each file; a picture of a parquet file costs those of its row group, which its neighbours share.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from framestream.pipeline.utils.atomic_io import atomic_file
from framestream.tools.fetch.archives.member_table import (
    GZIPPED,
    PLAIN,
    REFUSALS,
    ROW,
    ArchiveMember,
    MemberTable,
    cached_table,
    digest,
    make_table,
    merge_tables,
    normalize_path,
    stable_name,
)
from framestream.tools.fetch.archives.multipart import MultipartFile
from framestream.tools.fetch.archives.parquet import MAGIC, ParquetImages, list_parquet
from framestream.tools.fetch.archives.parquet_rows import MAX_SAME_NAME, find_rows
from framestream.tools.fetch.archives.readahead import ReadAheadFile
from framestream.tools.fetch.archives.tar import copy_member, open_gzip, is_tar, list_tar, list_tar_gz
from framestream.tools.fetch.archives.zip import has_zip_directory, list_zip, is_zip, unpack_member, open_zip_stream
from framestream.tools.fetch.base import UNKNOWN, FetchError, RandomAccessFile, local_name

#: First bytes of archives that are not read, with their names.
OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "Zstandard", b"7z\xbc\xaf": "7z", b"Rar!": "RAR"}

#: What to do about rows of parquet files that share a name.
UNIQUE = "name them by the paths they are stored with, or write them to files and map dir:PATH"


def open_archives(
    files: Sequence[RandomAccessFile], join: bool, inside: str, work: Path | None, limit: int, origin: str
) -> ArchiveSource:
    """The files in one or many archives; of a path in several archives, the first archive's counts.

    Args:
        files: the archives, or, with ``join``, the parts in order of one archive that was cut.
        inside: folder within the archives that paths are relative to; empty for all of them.
        work: folder where lists of members are kept for other processes and the next time; none are kept if None.
        limit: bytes that a file, or all files of a folder of frames, may have.
        origin: what the root map calls the archives.

    Raises:
        FetchError: an archive cannot be read, or is not whole so that nothing in it can be found.
    """
    return ArchiveSource([MultipartFile(files)] if join else files, inside, work, limit, origin)


class ArchiveSource:
    """A :class:`~framestream.tools.fetch.base.Source`. Threads may share it; a copy sent to another process reads the lists of
    members from the work folder."""

    def __init__(
        self, files: Sequence[RandomAccessFile], inside: str, work: Path | None, limit: int, origin: str
    ) -> None:
        folder = normalize_path(inside) if inside.strip("/.") else ""
        if folder is None:
            raise FetchError("outside_root", origin, f"{inside!r} is not a folder in an archive")
        self.origin = origin
        self._files, self._inside, self._work, self._limit = tuple(files), folder, work, limit
        self._names = [digest(file.name, file.size, file.identity) for file in self._files]
        self._indexes: dict[int, bytes] = {}  # of gzip files, if there is no work folder
        self._pictures = ParquetImages(self._files, self._names, limit)
        self._members = MemberTable(self._table())

    def __reduce__(self) -> tuple:
        return ArchiveSource, (self._files, self._inside, self._work, self._limit, self.origin)

    @property
    def notes(self) -> list[str]:
        """One line for each archive that is damaged but in part readable."""
        return self._members.notes

    def find(self, path: str, tree: bool = False) -> int | None:
        """See :meth:`framestream.tools.fetch.base.Source.find`."""
        members = [member for _, member in self._wanted(path, tree) if member.refusal != "dangling"]
        if members and members[0].method == ROW:
            return UNKNOWN
        return sum(member.size for member in members) if members else None

    def identity(self, path: str, tree: bool = False) -> str:
        """Names the contents of ``path``: another text where they come from another archive, or it has changed."""
        return digest([[self._names[member.archive], member.offset] for _, member in self._wanted(path, tree)])

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """See :meth:`framestream.tools.fetch.base.Source.fetch`.

        Raises:
            FetchError: missing_file, outside_root, unsupported, too_large, truncated, corrupt, bad_checksum, and what
                reading the archive raises.
        """
        wanted = self._wanted(path, tree)
        if not wanted:
            what = "no files in this folder" if tree else "no such file"
            raise FetchError("missing_file", path, f"{what} among the {len(self._members)} of {self.origin}")
        for name, member in wanted:
            if member.refusal:
                reason, text = REFUSALS[member.refusal]
                raise FetchError(reason, f"{path}/{name}" if tree else path, f"{text} ({self._place(member)})")
        if wanted[0][1].method == ROW:
            return self._take_row(path, [member for _, member in wanted], scratch / local_name(path))
        size = sum(member.size for _, member in wanted)
        if size > self._limit:
            raise FetchError("too_large", path, f"{size} bytes, where {self._limit} are allowed (data.fetch_mb)")
        if not tree:
            target = scratch / local_name(path)
            self._take(path, [(target, wanted[0][1])])
            return target
        target = scratch / "frames"
        target.mkdir()
        self._take(path, [(target / _safe_name(name, rank), member) for rank, (name, member) in enumerate(wanted)])
        return target

    # Members ----------------------------------------------------------------------------------------------------------

    def _wanted(self, path: str, tree: bool) -> list[tuple[str, ArchiveMember]]:
        """The file, or the files directly in the folder, with their names; rows may be several of one name."""
        if normalize_path(path) != path:
            raise FetchError("outside_root", f"{self.origin} {path!r}", "is not a path below the archives' folder")
        inner = f"{self._inside}/{path}" if self._inside else path
        if tree:
            return list(self._members.list_folder(inner))
        member = self._members.get(inner)
        return [(path, member) for member in (find_rows(self._members, inner) if member is None else [member])]

    def _place(self, member: ArchiveMember) -> str:
        return f"in {self._files[member.archive].name}"

    def _table(self) -> pa.Table:
        if len(self._files) == 1:
            return self._list(0)
        return cached_table(
            self._work, digest(self._names), lambda: merge_tables([self._list(n) for n in range(len(self._files))])
        )

    def _list(self, number: int) -> pa.Table:
        """The members of one archive."""
        return cached_table(self._work, self._names[number], lambda: self._read_list(number))

    def _read_list(self, number: int) -> pa.Table:
        file, notes = self._files[number], []
        kind = _detect_format(file)
        if kind == "tar.gz":
            with self._new_index(number) as index:
                return make_table(list_tar_gz(file, index, notes), notes)
        if kind == "parquet":
            return make_table(list_parquet(file, self._names[number], notes), notes)
        return make_table(list_zip(file) if kind == "zip" else list_tar(file, notes), notes)

    # Contents ---------------------------------------------------------------------------------------------------------

    def _take(self, path: str, wanted: list[tuple[Path, ArchiveMember]]) -> None:
        """Write members into files, in the order in which they lie in their archives."""
        wanted.sort(key=lambda item: (item[1].archive, item[1].offset))
        for number, group in groupby(wanted, key=lambda item: item[1].archive):
            items = list(group)
            with self._open(number, items[-1][1]) as stream:
                for target, member in items:
                    pieces = unpack_member if member.method >= 0 else copy_member
                    with open(target, "xb") as out:
                        for piece in pieces(stream, member, f"{path} {self._place(member)}"):
                            out.write(piece)

    def _take_row(self, path: str, rows: list[ArchiveMember], target: Path) -> Path:
        """Write the picture of rows, which must be the same one in all of them, into a file."""
        if len(rows) > MAX_SAME_NAME:
            raise FetchError("bad_media", path, f"{len(rows)} rows of {self.origin} have this name; {UNIQUE}")
        read = (self._pictures.read(row.archive, row.offset, f"{path} {self._place(row)}") for row in rows)
        pictures = {picture for picture in read if picture is not None}
        if not pictures:
            raise FetchError("missing_file", path, f"the row of this name has no picture ({self._place(rows[0])})")
        if len(pictures) > 1:
            text = f"{len(pictures)} different pictures of {self.origin} have this name; {UNIQUE}"
            raise FetchError("bad_media", path, text)
        with open(target, "xb") as out:
            out.write(pictures.pop())
        return target

    @contextlib.contextmanager
    def _open(self, number: int, last: ArchiveMember) -> Iterator[BinaryIO]:
        """A stream from which members of one archive up to ``last`` are read."""
        file, method = self._files[number], last.method
        with contextlib.ExitStack() as stack:
            if method == GZIPPED:
                index = stack.enter_context(self._index(number))
                yield stack.enter_context(open_gzip(file, index))
            elif method == PLAIN:
                yield ReadAheadFile(file, last.offset + last.packed)
            else:
                yield open_zip_stream(file, last)

    @contextlib.contextmanager
    def _new_index(self, number: int) -> Iterator[BinaryIO]:
        if self._work is None:
            yield (memory := io.BytesIO())
            self._indexes[number] = memory.getvalue()
        else:
            part = stable_name(self._index_path(number))
            with atomic_file(part) as file:
                yield file
            os.replace(part, self._index_path(number))

    def _index(self, number: int) -> BinaryIO:
        return io.BytesIO(self._indexes[number]) if self._work is None else open(self._index_path(number), "rb")

    def _index_path(self, number: int) -> Path:
        return self._work / f"{self._names[number]}.gzip"


def _detect_format(file: RandomAccessFile) -> str:
    """zip, tar, tar.gz or parquet, judged from the contents; names lie."""
    head = file.read(0, 512)
    if not head:
        raise FetchError("empty_file", file.name, "has no bytes")
    if head.startswith(b"\x1f\x8b"):
        return "tar.gz"
    if head.startswith(MAGIC):
        return "parquet"
    if is_zip(head):
        return "zip"
    if is_tar(head):
        return "tar"
    if other := next((name for mark, name in OTHERS.items() if head.startswith(mark)), None):
        fix = "unpack it and name the folder, or pack it anew as tar or zip"
        raise FetchError("unsupported", file.name, f"is a {other} file, which cannot be read at any place; {fix}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise FetchError("not_media", file.name, "is an HTML page, not an archive; the address may need a login")
    if has_zip_directory(file):  # behind a program that unpacks it
        return "zip"
    hint = "; its first part may be missing or not the first one" if isinstance(file, MultipartFile) else ""
    raise FetchError("unsupported", file.name, f"is no zip, tar or tar.gz archive and no parquet file{hint}")


def _safe_name(name: str, rank: int) -> str:
    """A name for a file of a folder that is harmless on any file system. The last number in it, by which frames are
    ordered, stays the last one; where there is none it becomes the file's rank by name."""
    if re.fullmatch(r"(?!\d{7}_)[A-Za-z0-9_][A-Za-z0-9_. ()+=@,-]{0,199}", name):
        return name
    return f"{rank:07d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[-100:]}"
