"""Read members of tar and tar.gz archives at their offsets.

One pass over the headers finds every member. A gzip file can only be unpacked in sequence: rapidgzip records the state
of the decompressor about every 4 MiB on the first pass. With this index, about 0.1 % of the archive, any member is read
by unpacking a few MiB. Streaming would instead unpack half of the archive for each member, on average.
"""

from __future__ import annotations

import contextlib
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

import rapidgzip

from framestream.tools.fetch.archives.member_names import normalize_path
from framestream.tools.fetch.archives.member_table import GZIPPED, PLAIN, ArchiveMember, resolve_link
from framestream.tools.fetch.archives.readahead import CHUNK, MAX_READ, ReadAheadFile, SeekableReader, read_chunks
from framestream.tools.fetch.base import FetchError, RandomAccessFile

BLOCK = tarfile.BLOCKSIZE  #: headers and data begin at multiples of it
MAX_SIZE = 1 << 62  #: bytes of a member; a table cannot hold more
MAX_RATIO, RATIO_SLACK = 20, 1 << 30  #: a gzip file may unpack to MAX_RATIO times its size plus RATIO_SLACK bytes
HEADER_SLACK = 1 << 24  #: all headers of an archive may have MAX_RATIO times its size plus HEADER_SLACK bytes
MAX_HEADER = 1 << 20  #: bytes of the headers of one member
MAX_GLOBALS = 1000  #: records that count for all members
DAMAGED = "the gzip file is damaged or cut; fetch it again, or unpack it by hand as far as possible"


def is_tar(head: bytes) -> bool:
    """Return whether a file that starts with these bytes is a tar archive. 512 bytes are enough."""
    try:
        tarfile.TarInfo.frombuf(head[:BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return len(head) >= BLOCK and not any(head[:BLOCK])  # an archive without members begins with its end mark
    return True


def list_tar(file: RandomAccessFile, notes: list[str]) -> Iterator[tuple[str, ArchiveMember]]:
    """Yield path and member of every file and link, in the order of the archive.

    Args:
        notes: problems of the archive are appended to it.
    """
    return _walk(ReadAheadFile(file), file, PLAIN, notes, max_unpacked=None)


def list_tar_gz(file: RandomAccessFile, index: BinaryIO, notes: list[str]) -> Iterator[tuple[str, ArchiveMember]]:
    """Yield path and member of every file and link of a gzip file, in the order of the archive.

    Args:
        index: what :func:`open_gzip` needs is written into it.
        notes: problems of the archive are appended to it.

    Raises:
        FetchError: unsupported, if it contains no tar archive; too_large; corrupt or bad_checksum, of the whole file.
    """
    max_unpacked = MAX_RATIO * file.size + RATIO_SLACK
    with GzipStream(file) as stream:
        head = stream.read(BLOCK)
        if len(head) < BLOCK and _is_cut(file):
            raise FetchError("corrupt", file.name, DAMAGED)
        if not is_tar(head):
            raise FetchError("unsupported", file.name, "is a gzip file, but contains no tar archive")
        for path, member in _walk(stream, file, GZIPPED, notes, max_unpacked):
            if member.refusal == "cut":
                raise FetchError("corrupt", file.name, DAMAGED)
            yield path, member
        while stream.read(CHUNK):  # to the end, where the checksum of the whole file is
            _check_unpacked(file.name, stream.tell(), max_unpacked)
        stream.write_index(index)


def _is_cut(file: RandomAccessFile) -> bool:
    """Return whether a gzip file ends in its first block. rapidgzip reports no error then and returns nothing."""
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)  # 16: with a gzip header
    with contextlib.suppress(zlib.error):
        unpacker.decompress(file.read(0, MAX_READ), BLOCK)
    return not unpacker.eof


def open_gzip(file: RandomAccessFile, index: BinaryIO) -> GzipStream:
    """Return the unpacked contents of a gzip file, readable at any offset with the index of :func:`list_tar_gz`."""
    return GzipStream(file, index)


def copy_member(stream: SeekableReader, member: ArchiveMember, location: str) -> Iterator[bytes]:
    """Yield the bytes of a member in chunks.

    Raises:
        FetchError: truncated.
    """
    stream.seek(member.offset)
    yield from read_chunks(stream, member.size, location)


class GzipStream(io.RawIOBase):
    """The unpacked contents of a gzip file, as a file object."""

    def __init__(self, file: RandomAccessFile, index: BinaryIO | None = None) -> None:
        self._name, self._source = file.name, _RememberingFile(file)
        with self._convert_errors():
            self._stream = rapidgzip.RapidgzipFile(self._source, parallelization=1)
            if index:
                self._stream.import_index(index)

    def tell(self) -> int:
        """Return the position in the unpacked contents."""
        return self._stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set and return the position in the unpacked contents."""
        with self._convert_errors():
            return self._stream.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` unpacked bytes from the position, fewer only at the end.

        Raises:
            ValueError: more than 8 MiB at once, which readers only ask for if a header is forged.
        """
        if size > MAX_READ:
            raise ValueError(f"a read of {size} bytes at once")
        with self._convert_errors():
            return self._stream.read(size)

    def write_index(self, file: BinaryIO) -> None:
        """Write the states of the decompressor that the passes so far have recorded."""
        with self._convert_errors():
            self._stream.export_index(file)

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()
        super().close()

    @contextlib.contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Turn rapidgzip's errors into FetchErrors. An error of reading the file itself is raised as it is."""
        try:
            yield
        except (ValueError, RuntimeError, ArithmeticError, LookupError, MemoryError, OSError, TypeError) as error:
            if self._source.error is not None:
                raise self._source.error from None
            reason = "bad_checksum" if "CRC32" in str(error) else "corrupt"
            raise FetchError(reason, self._name, DAMAGED) from None


class _RememberingFile(ReadAheadFile):
    """A file object that keeps the error of a read, which rapidgzip turns into one of its own."""

    error: FetchError | None = None

    def read(self, size: int = -1) -> bytes:
        """See :meth:`ReadAheadFile.read`."""
        try:
            return super().read(size)
        except FetchError as error:
            self.error = error
            raise


# Headers --------------------------------------------------------------------------------------------------------------

#: What tarfile raises on bytes that are not a header.
_HEADER_ERRORS = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError, EOFError)


def _walk(
    stream: ReadAheadFile | GzipStream,
    file: RandomAccessFile,
    method: int,
    notes: list[str],
    max_unpacked: int | None,
) -> Iterator[tuple[str, ArchiveMember]]:
    """Yield path and member of every file and link. A break in the archive ends the walk with a note.

    A member is yielded only when the next header is valid, because a break may be within its data.
    """
    previous: tuple[str, ArchiveMember] | None = None
    name, position = file.name, 0
    stream.seek(0)
    try:
        for info in _read_headers(_HeaderStream(stream, file)):
            if previous:
                yield previous
            previous, position = _to_member(info, method), info.offset_data
            if max_unpacked:
                _check_unpacked(name, position + info.size, max_unpacked)
    except _HEADER_ERRORS as error:
        notes.append(f"{name}: breaks after byte {position} ({error}); members from there on are lost; fetch it again")
        if previous and not _is_complete(stream, previous[1]):
            previous = previous[0], previous[1]._replace(refusal="cut")
    if previous:
        yield previous


class _HeaderStream:
    """A stream for tarfile that bounds what it reads for one member, and for all of them.

    tarfile keeps what headers say in memory: long names, records, and the map of a sparse file.
    """

    def __init__(self, stream: ReadAheadFile | GzipStream, file: RandomAccessFile) -> None:
        self.seek, self.tell, self._read = stream.seek, stream.tell, stream.read
        self._name, self._budget = file.name, MAX_RATIO * file.size + HEADER_SLACK
        self._left = MAX_HEADER

    def start_member(self) -> None:
        """Begin with the headers of the next member."""
        self._left = MAX_HEADER

    def read(self, size: int) -> bytes:
        """Return ``size`` bytes from the position, fewer only at the end.

        Raises:
            tarfile.ReadError: the headers of this member are too long.
            FetchError: too_large, if all of them are.
        """
        self._left -= size
        self._budget -= size
        if self._left < 0:
            raise tarfile.ReadError(f"headers of over {MAX_HEADER} bytes")
        if self._budget < 0:
            message = f"its headers unpack to over {MAX_RATIO} times its size; unpack it and map dir:PATH"
            raise FetchError("too_large", self._name, message)
        return self._read(size)


def _read_headers(stream: _HeaderStream) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of an archive.

    Raises:
        one of _HEADER_ERRORS: the headers stop before the end mark, a block of zeros.
    """
    with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        last = -1
        while tar.offset and (info := tar.next()):  # 0: empty, where Python 3.10 would seek to -1
            stream.start_member()
            # tarfile keeps an object of every member, which nothing here needs.
            tar.members.clear()  # type: ignore[attr-defined]  # typeshed declares TarFile without ``members``
            if len(tar.pax_headers) > MAX_GLOBALS:
                raise tarfile.ReadError(f"over {MAX_GLOBALS} global records")
            if info.offset <= last or not 0 <= info.size < MAX_SIZE or not 0 <= info.offset_data < MAX_SIZE:
                raise tarfile.ReadError("a header that leads nowhere")
            last = info.offset
            yield info
        stream.seek(tar.offset)
        block = stream.read(BLOCK)
        if len(block) < BLOCK or any(block):
            raise tarfile.ReadError("bad header" if len(block) == BLOCK else "the end is missing")


def _is_complete(stream: SeekableReader, member: ArchiveMember) -> bool:
    """Return whether an archive that breaks after this member contains all of it.

    It does if the archive simply ends after the member's data. Bytes after it that are not a header mean that the
    member may be damaged too.
    """
    end = member.offset + member.size
    stream.seek(-(-end // BLOCK) * BLOCK)  # rounded up: where the next header would be
    if len(stream.read(BLOCK)) == BLOCK:
        return False
    stream.seek(max(end - 1, 0))
    return bool(stream.read(1))


def _to_member(info: tarfile.TarInfo, method: int) -> tuple[str, ArchiveMember] | None:
    """Return path and member; None for folders and for names that lead out of the archive."""
    path = normalize_path(info.name)
    if path is None or info.isdir():
        return None
    if info.issym() or info.islnk():
        # The target of a hard link is relative to the archive, that of a symbolic link to the link's folder.
        link = resolve_link("", info.linkname.lstrip("/")) if info.islnk() else resolve_link(path, info.linkname)
        return path, ArchiveMember(0, info.offset_data, 0, 0, 0, method, "" if link else "outside", link)
    refusal = "sparse" if info.issparse() else "" if info.isreg() else "special"
    return path, ArchiveMember(0, info.offset_data, info.size, info.size, 0, method, refusal)


def _check_unpacked(name: str, size: int, max_unpacked: int) -> None:
    if size > max_unpacked:
        raise FetchError("too_large", name, f"unpacks to over {max_unpacked >> 20} MiB, {MAX_RATIO} times its size")
