"""The files inside zip, tar and tar.gz archives, and the images inside parquet files, as a source.

Archives are not unpacked. The directory (zip), the headers (tar) or the columns of names (parquet) are read once, by
the first process that opens the archive. A file then costs only its bytes in the archive. A tar.gz is read through once
and then costs a few MiB for each file. An image in a parquet file costs the images of its row group up to its row.
Neighboring images share that cost.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from framestream.pipeline.utils.atomic_io import atomic_file
from framestream.pipeline.utils.parquet_footer import MAGIC
from framestream.tools.fetch.archives.list_cache import cached_table, digest, index_path, open_index, process_path
from framestream.tools.fetch.archives.member_names import normalize_path
from framestream.tools.fetch.archives.member_table import (
    GZIPPED,
    PLAIN,
    REFUSALS,
    ROW,
    SCHEMA,
    ArchiveMember,
    MemberTable,
    make_table,
    merge_tables,
)
from framestream.tools.fetch.archives.multipart import MultipartFile
from framestream.tools.fetch.archives.parquet import ParquetImages, list_parquet
from framestream.tools.fetch.archives.parquet_rows import MAX_SAME_NAME, find_rows
from framestream.tools.fetch.archives.readahead import ReadAheadFile
from framestream.tools.fetch.archives.tar import copy_member, is_tar, list_tar, list_tar_gz, open_gzip
from framestream.tools.fetch.archives.zip import has_zip_directory, is_zip, list_zip, open_zip_stream, unpack_member
from framestream.tools.fetch.base import UNKNOWN, FetchError, RandomAccessFile, local_name

#: First bytes of unsupported archives, with their names.
UNSUPPORTED = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "Zstandard",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "RAR",
}

#: Members of zip archives may unpack to MAX_RATIO times their size plus RATIO_SLACK bytes.
MAX_RATIO, RATIO_SLACK = 100, 1 << 28

ChunkReader = Callable[[ArchiveMember, str], Iterator[bytes]]  #: (member, location for messages) -> its chunks

#: Fix for rows of parquet files that share a name.
UNIQUE_NAMES_FIX = "name them by the paths they are stored with, or write them to files and map dir:PATH"


def open_archives(
    files: Sequence[RandomAccessFile], join: bool, inside: str, work: Path | None, limit: int, origin: str
) -> ArchiveSource:
    """Return the files in one or more archives as a source. If a path is in several archives, the first one counts.

    Args:
        files: the archives, or, with ``join``, the parts in order of one archive that was cut.
        inside: folder within the archives that paths are relative to; empty for their root.
        work: folder that caches lists of members for other processes and later runs; nothing is cached if None.
        limit: bytes of a file, or of all files of a folder of frames.
        origin: how the root map names the archives.

    Raises:
        FetchError: an archive cannot be read, or is so incomplete that none of its members can be found.
    """
    return ArchiveSource([MultipartFile(files)] if join else files, inside, work, limit, origin)


class ArchiveSource:
    """A :class:`~framestream.tools.fetch.base.MediaSource` for the members of archives.

    Threads may share it. A copy in another process reads the lists of members from the folder ``work``.
    """

    def __init__(
        self, files: Sequence[RandomAccessFile], inside: str, work: Path | None, limit: int, origin: str
    ) -> None:
        folder = normalize_path(inside) if inside.strip("/.") else ""
        if folder is None:
            raise FetchError("outside_root", origin, f"{inside!r} is not a folder in an archive")
        self.origin = origin
        self._files, self._inside, self._work, self._limit = tuple(files), folder, work, limit
        self._names = [digest(file.name, file.size, file.identity) for file in self._files]  # of cached lists
        self._indexes: dict[int, bytes] = {}  # of gzip files by number, if there is no folder ``work``
        self._images = ParquetImages(self._files, self._names, limit)
        self._members = MemberTable(self._load_table())

    def __reduce__(self) -> tuple[type[ArchiveSource], tuple[object, ...]]:
        return ArchiveSource, (self._files, self._inside, self._work, self._limit, self.origin)

    @property
    def notes(self) -> list[str]:
        """One line for each problem of a damaged archive that is partly readable."""
        return self._members.notes

    def find(self, path: str, tree: bool = False) -> int | None:
        """See :meth:`framestream.tools.fetch.base.MediaSource.find`."""
        members = [member for _, member in self._find_members(path, tree) if member.refusal != "dangling"]
        if members and members[0].method == ROW:
            return UNKNOWN
        return sum(member.size for member in members) if members else None

    def identity(self, path: str, tree: bool = False) -> str:
        """Return a text that changes when ``path`` comes from another archive, or its archive has changed."""
        return digest([[self._names[member.archive], member.offset] for _, member in self._find_members(path, tree)])

    def fetch(self, path: str, scratch: Path, tree: bool = False) -> Path:
        """See :meth:`framestream.tools.fetch.base.MediaSource.fetch`.

        Raises:
            FetchError: missing_file, outside_root, unsupported, too_large, truncated, corrupt, bad_checksum, and what
                reading the archive raises.
        """
        found = self._find_members(path, tree)
        if not found:
            problem = "no files in this folder" if tree else "no such file"
            near = self._members.similar(f"{self._inside}/{path}" if self._inside else path)
            raise FetchError("missing_file", path, f"{problem} among the {len(self._members)} of {self.origin}{near}")
        for name, member in found:
            if member.refusal:
                reason, message = REFUSALS[member.refusal]
                raise FetchError(reason, f"{path}/{name}" if tree else path, f"{message} ({self._in_archive(member)})")
        if found[0][1].method == ROW:
            return self._write_image(path, [member for _, member in found], scratch / local_name(path))
        self._check_size(path, [member for _, member in found])
        if not tree:
            target = scratch / local_name(path)
            self._extract(path, [(target, found[0][1])])
            return target
        target = scratch / "frames"
        target.mkdir()
        targets = [(target / _safe_name(name, rank), member) for rank, (name, member) in enumerate(found)]
        self._extract(path, targets)
        return target

    def _check_size(self, path: str, members: list[ArchiveMember]) -> None:
        """Refuse members that unpack to too much: for the limit, or for what the archive has of them."""
        size = sum(member.size for member in members)
        if size > self._limit:
            raise FetchError("too_large", path, f"{size} bytes, where {self._limit} are allowed (data.fetch_mb)")
        archives = {member.archive for member in members}
        # Members may overlap, so that together they are no more than their archives.
        packed = min(sum(member.packed for member in members), sum(self._files[number].size for number in archives))
        if size > MAX_RATIO * packed + RATIO_SLACK:
            message = f"unpacks to {size} bytes, over {MAX_RATIO} times its {packed} bytes in the archive; unpack it"
            raise FetchError("too_large", path, f"{message} yourself and map dir:PATH")

    # Members ----------------------------------------------------------------------------------------------------------

    def _find_members(self, path: str, tree: bool) -> list[tuple[str, ArchiveMember]]:
        """Return the file, or the files directly in the folder, with their names. Several rows may have one name."""
        if normalize_path(path) != path:
            raise FetchError("outside_root", f"{self.origin} {path!r}", "is not a path below the archives' folder")
        member_path = f"{self._inside}/{path}" if self._inside else path
        if tree:
            return list(self._members.list_folder(member_path))
        member = self._members.get(member_path)
        return [(path, row) for row in (find_rows(self._members, member_path) if member is None else [member])]

    def _in_archive(self, member: ArchiveMember) -> str:
        """Name the archive of a member, for messages."""
        return f"in {self._files[member.archive].name}"

    def _load_table(self) -> pa.Table:
        """Return the members of all archives."""
        if len(self._files) == 1:
            return self._load_members(0)

        def merge() -> pa.Table:
            return merge_tables([self._load_members(number) for number in range(len(self._files))])

        return cached_table(self._work, digest(self._names), SCHEMA, merge)

    def _load_members(self, number: int) -> pa.Table:
        """Return the members of one archive."""
        return cached_table(self._work, self._names[number], SCHEMA, lambda: self._list_members(number))

    def _list_members(self, number: int) -> pa.Table:
        """Read the list of members from the archive itself."""
        file = self._files[number]
        notes: list[str] = []
        archive_format = _detect_format(file)
        if archive_format == "tar.gz":
            with self._new_index(number) as index:
                return make_table(list_tar_gz(file, index, notes), file.name, notes)
        if archive_format == "parquet":
            members = list_parquet(file, self._names[number], notes)
        else:
            members = list_zip(file) if archive_format == "zip" else list_tar(file, notes)
        return make_table(members, file.name, notes)

    # Contents ---------------------------------------------------------------------------------------------------------

    def _extract(self, path: str, targets: list[tuple[Path, ArchiveMember]]) -> None:
        """Write members into files, in the order of their offsets in their archives."""
        targets.sort(key=lambda item: (item[1].archive, item[1].offset))
        for number, group in groupby(targets, key=lambda item: item[1].archive):
            items = list(group)
            with self._open_chunks(number, items[-1][1]) as read_chunks:
                for target, member in items:
                    with open(target, "xb") as out:
                        for chunk in read_chunks(member, f"{path} {self._in_archive(member)}"):
                            out.write(chunk)

    def _write_image(self, path: str, rows: list[ArchiveMember], target: Path) -> Path:
        """Write the image of rows into a file. If there are several rows, their images must be equal."""
        if len(rows) > MAX_SAME_NAME:
            message = f"{len(rows)} rows of {self.origin} have this name; {UNIQUE_NAMES_FIX}"
            raise FetchError("bad_media", path, message)
        read = (self._images.read(row.archive, row.offset, f"{path} {self._in_archive(row)}") for row in rows)
        images = {image for image in read if image is not None}
        if not images:
            raise FetchError("missing_file", path, f"the row of this name has no image ({self._in_archive(rows[0])})")
        if len(images) > 1:
            message = f"{len(images)} different images of {self.origin} have this name; {UNIQUE_NAMES_FIX}"
            raise FetchError("bad_media", path, message)
        with open(target, "xb") as out:
            out.write(images.pop())
        return target

    @contextlib.contextmanager
    def _open_chunks(self, number: int, last: ArchiveMember) -> Iterator[ChunkReader]:
        """Yield a function that reads the chunks of members of one archive, up to ``last``."""
        file, method = self._files[number], last.method
        if method == GZIPPED:
            with self._open_index(number) as index, open_gzip(file, index) as unpacked:
                yield lambda member, location: copy_member(unpacked, member, location)
        elif method == PLAIN:
            stream = ReadAheadFile(file, last.offset + last.packed)
            yield lambda member, location: copy_member(stream, member, location)
        else:
            zip_stream = open_zip_stream(file, last)
            yield lambda member, location: unpack_member(zip_stream, member, location)

    @contextlib.contextmanager
    def _new_index(self, number: int) -> Iterator[BinaryIO]:
        """Yield a file for the index of a gzip file. It is stored at the end of the block, complete or not at all."""
        if self._work is None:
            memory = io.BytesIO()
            yield memory
            self._indexes[number] = memory.getvalue()
        else:
            path = index_path(self._work, self._names[number])
            part = process_path(path)
            with atomic_file(part) as file:
                yield file
            os.replace(part, path)

    def _open_index(self, number: int) -> BinaryIO:
        """Open the index of a gzip file. If it is damaged, the archive is listed again."""
        if self._work is None:
            return io.BytesIO(self._indexes[number])
        index = open_index(self._work, self._names[number])
        if index is None:
            self._load_members(number)
            index = open_index(self._work, self._names[number])
        if index is None:
            message = (
                f"its index in {self._work} (data.cache) is damaged again as soon as it is written; check the disk"
            )
            raise FetchError("corrupt", self._files[number].name, message)
        return index


def _detect_format(file: RandomAccessFile) -> str:
    """Return zip, tar, tar.gz or parquet, judged by the contents. Extensions are often wrong."""
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
    if name := next((name for magic, name in UNSUPPORTED.items() if head.startswith(magic)), None):
        fix = "unpack it and name the folder, or pack it again as tar or zip"
        raise FetchError("unsupported", file.name, f"is a {name} file, which cannot be read at any offset; {fix}")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise FetchError("not_media", file.name, "is an HTML page, not an archive; the address may need a login")
    if has_zip_directory(file):  # a self-extracting archive begins with a program
        return "zip"
    hint = "; its first part may be missing or not the first one" if isinstance(file, MultipartFile) else ""
    raise FetchError("unsupported", file.name, f"is not a zip, tar, tar.gz or parquet file{hint}")


def _safe_name(name: str, rank: int) -> str:
    """Return a file name that is harmless on any file system.

    Frames are ordered by the last number in their names. That number stays the last one. If a name has no number, the
    file's rank by name takes its role.
    """
    # At most 200 harmless characters. A name that looks like one of the names made below is replaced too, so that the
    # two kinds cannot collide.
    if re.fullmatch(r"(?!\d{7}_)[A-Za-z0-9_][A-Za-z0-9_. ()+=@,-]{0,199}", name):
        return name
    return f"{rank:07d}_{re.sub(r'[^A-Za-z0-9_.-]', '_', name)[-100:]}"
