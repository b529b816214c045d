"""Tar archives: one walk over the headers says where every member is; gzip files are unpacked from the nearest place.

A gzip file can only be read on end. rapidgzip notes on the first pass the state of the unpacking about every 4 MiB;
with these notes, about 0.1 % of the archive, any member is read by unpacking a few MiB. Streaming instead would unpack
half an archive for each member.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

import rapidgzip

from framestream.tools.fetch.archives.member_table import GZIPPED, PLAIN, ArchiveMember, normalize_path, resolve_link
from framestream.tools.fetch.archives.readahead import MAX_READ, ReadAheadFile
from framestream.tools.fetch.base import FetchError, RandomAccessFile

BLOCK = tarfile.BLOCKSIZE
CHUNK = 1 << 20  #: bytes handed on at once
DAMAGED = "the gzip file is damaged or cut; fetch it again, or unpack by hand what can be"
MAX_RATIO, RATIO_SLACK = 20, 1 << 30  #: a gzip file may unpack to RATIO times its size and SPARE bytes


def is_tar(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a tar archive; 512 are enough."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return len(head) >= BLOCK and not any(head[:BLOCK])  # an archive without members
    return True


def list_tar(file: RandomAccessFile, notes: list[str]) -> Iterator[tuple[str, ArchiveMember]]:
    """Path and member of every file and link, in the archive's order; what is wrong with the archive into ``notes``."""
    return _walk(ReadAheadFile(file), file.name, PLAIN, notes, bound=None)


def list_tar_gz(file: RandomAccessFile, index: BinaryIO, notes: list[str]) -> Iterator[tuple[str, ArchiveMember]]:
    """The same for a gzip file; what :func:`gunzip` needs is written into ``index``.

    Raises:
        FetchError: unsupported, where no tar archive is in it; too_large; corrupt or bad_checksum, of the whole file.
    """
    bound = MAX_RATIO * file.size + RATIO_SLACK
    with _Unpacked(file) as stream:
        head = stream.read(BLOCK)
        if len(head) < BLOCK and _is_cut(file):
            raise FetchError("corrupt", file.name, DAMAGED)
        if not is_tar(head):
            raise FetchError("unsupported", file.name, "is a gzip file, but no tar archive is in it")
        for path, member in _walk(stream, file.name, GZIPPED, notes, bound):
            if member.refusal == "cut":
                raise FetchError("corrupt", file.name, DAMAGED)
            yield path, member
        while stream.read(CHUNK):  # to the end, where the checksum of the whole is
            _check_bound(file.name, stream.tell(), bound)
        stream.write_index(index)


def _is_cut(file: RandomAccessFile) -> bool:
    """Whether a gzip file breaks off in its first block, of which rapidgzip makes nothing and no error."""
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    with contextlib.suppress(zlib.error):
        unpacker.decompress(file.read(0, MAX_READ), BLOCK)
    return not unpacker.eof


def open_gzip(file: RandomAccessFile, index: BinaryIO) -> BinaryIO:
    """What a gzip file unpacks to, readable at any place with the index of :func:`list_tar_gz`."""
    return _Unpacked(file, index)


def copy_member(stream: BinaryIO, member: ArchiveMember, place: str) -> Iterator[bytes]:
    """The bytes of a member, piece by piece.

    Raises:
        FetchError: truncated.
    """
    stream.seek(member.offset)
    left = member.size
    while left:
        piece = stream.read(min(left, CHUNK))
        if not piece:
            raise FetchError("truncated", place, f"the archive ends {left} bytes before the member does")
        left -= len(piece)
        yield piece


class _Unpacked(io.RawIOBase):
    """A gzip file unpacked."""

    def __init__(self, file: RandomAccessFile, index: BinaryIO | None = None) -> None:
        self._name = file.name
        self._stream = rapidgzip.RapidgzipFile(ReadAheadFile(file), parallelization=1)
        if index:
            self._stream.import_index(index)

    def tell(self) -> int:
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with self._errors():
            return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        if size > MAX_READ:
            raise ValueError(f"{size} bytes are asked for at once")
        with self._errors():
            return self._stream.read(size)

    def write_index(self, file: BinaryIO) -> None:
        with self._errors():
            self._stream.export_index(file)

    def close(self) -> None:
        self._stream.close()
        super().close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (ValueError, RuntimeError) as error:
            reason = "bad_checksum" if "CRC32" in str(error) else "corrupt"
            raise FetchError(reason, self._name, DAMAGED) from None


# Headers --------------------------------------------------------------------------------------------------------------

#: What tarfile raises on headers that are none.
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, EOFError)


def _walk(
    stream: BinaryIO, name: str, method: int, notes: list[str], bound: int | None
) -> Iterator[tuple[str, ArchiveMember]]:
    held: tuple[str, ArchiveMember] | None = None  # a member is handed on when what comes behind it is in order
    place = 0
    stream.seek(0)
    try:
        for info in _infos(stream):
            if held:
                yield held
            held, place = _member(info, method), info.offset_data
            if bound:
                _check_bound(name, place + info.size, bound)
    except _BROKEN as error:
        notes.append(f"{name}: breaks behind byte {place} ({error}); members from there on are lost; fetch it again")
        if held and not _ends_behind(stream, held[1]):
            held = held[0], held[1]._replace(refusal="cut")
    if held:
        yield held


def _infos(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The headers of an archive; raises one of _BROKEN where they stop before the mark at the archive's end."""
    with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        last = -1
        while info := tar.next():
            tar.members.clear()  # tarfile would keep them all
            if info.offset <= last or not 0 <= info.size < 1 << 62:
                raise tarfile.ReadError("a header that leads nowhere")
            last = info.offset
            yield info
        stream.seek(tar.offset)
        block = stream.read(BLOCK)
        if len(block) < BLOCK or any(block):
            raise tarfile.ReadError("bad header" if len(block) == BLOCK else "the end is missing")


def _ends_behind(stream: BinaryIO, member: ArchiveMember) -> bool:
    """Whether an archive that breaks after this member holds all of it: where it just ends, behind the member."""
    end = member.offset + member.size
    stream.seek(-(-end // BLOCK) * BLOCK)
    if len(stream.read(BLOCK)) == BLOCK:  # there is something, but no header: the member may be wrong as well
        return False
    stream.seek(max(end - 1, 0))
    return bool(stream.read(1))


def _member(info: tarfile.TarInfo, method: int) -> tuple[str, ArchiveMember] | None:
    """Path and member, or None for folders and for names that lead out of the archive."""
    path = normalize_path(info.name)
    if path is None or info.isdir():
        return None
    if info.issym() or info.islnk():
        link = resolve_link("", info.linkname.lstrip("/")) if info.islnk() else resolve_link(path, info.linkname)
        return path, ArchiveMember(0, info.offset_data, 0, 0, 0, method, "" if link else "outside", link)
    refusal = "sparse" if info.issparse() else "" if info.isreg() else "special"
    return path, ArchiveMember(0, info.offset_data, info.size, info.size, 0, method, refusal)


def _check_bound(name: str, place: int, bound: int) -> None:
    if place > bound:
        raise FetchError("too_large", name, f"unpacks to over {bound >> 20} MiB, {MAX_RATIO} times its size")
