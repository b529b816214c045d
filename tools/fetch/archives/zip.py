"""Zip archives (APPNOTE.TXT 6.3.10 of PKWARE), read at the places where their members are.

zipfile keeps an object for every member: 1.1 GB for 2 million, in every process that opens the archive. Here the
directory is read once, into a table, and afterwards a member is found without it. Unlike zipfile this also reads
archives that were written in several parts (``zip -s``), and unpacks bzip2 and LZMA in bounded memory.
"""

from __future__ import annotations

import bz2
import lzma
import re
import stat
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from framestream.tools.fetch.archives.member_table import ArchiveMember, normalize_path, resolve_link
from framestream.tools.fetch.archives.multipart import MultipartFile
from framestream.tools.fetch.archives.readahead import ReadAheadFile
from framestream.tools.fetch.base import FetchError, RandomAccessFile

CHUNK = 1 << 20  #: bytes handed on at once
METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA"}
MAX_LINKS = 4096  #: symbolic links of an archive that are followed; the place of each has to be read from its data

_LONGEST_LINK = 4096  # bytes
_LONGEST_COMMENT = (1 << 16) - 1  # bytes, behind the directory
_LARGEST = 1 << 62  # bytes; what is larger cannot be kept in a table
_SLACK = 1024  # bytes that the names and fields of a local header mostly fit into
_FULL = (1 << 32) - 1  # the number is in the Zip64 field

_LOCAL = struct.Struct("<4s5H3L2H")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_END_MARK = b"PK\5\6"
_ENDS = re.compile(rb"PK\x05\x06(?=.{16}(..))", re.S)  # with the length of the comment that follows
_UTF8, _ENCRYPTED = 1 << 11, 1 << 0
_FAT, _UNIX = 0, 3  # systems that an archive was made on


def list_zip(file: RandomAccessFile) -> Iterator[tuple[str, ArchiveMember]]:
    """Path and member of every file and link, in the order of the directory.

    Raises:
        FetchError: truncated, where the directory or parts of the archive are missing; corrupt.
    """
    directory = _find_directory(file)
    borders = file.starts if isinstance(file, MultipartFile) else [0]
    links, first = 0, {}  # first: the first member that begins in each part
    for path, member, is_link in _entries(file, directory):
        part = bisect_right(borders, member.offset)
        if not member.refusal and (part not in first or member.offset < first[part][1].offset):
            first[part] = path, member
        if is_link and not member.refusal:
            links += 1
            if links > MAX_LINKS:
                raise FetchError(
                    "unsupported", file.name, f"has over {MAX_LINKS} symbolic links; pack the files instead"
                )
            member = _follow(file, path, member)
        yield path, member
    if len(first) > 1:  # parts in another order are seen before a member is asked for
        for path, member in first.values():
            _seek_data(ReadAheadFile(file, member.offset), member, f"{file.name}: {path}")


def is_zip(head: bytes) -> bool:
    """Whether a file that starts with these bytes is a zip archive."""
    return head.startswith((b"PK\3\4", _END_MARK, b"PK\7\x08", b"PK00PK\3\4"))


def has_zip_directory(file: RandomAccessFile) -> bool:
    """Whether a file ends like a zip archive, whatever stands before it."""
    return _END_MARK in _tail(file)


def open_zip_stream(file: RandomAccessFile, last: ArchiveMember) -> ReadAheadFile:
    """A stream for reading members up to ``last``, and little that lies behind it."""
    return ReadAheadFile(file, last.offset + _LOCAL.size + _SLACK + last.packed)


def unpack_member(stream: ReadAheadFile, member: ArchiveMember, place: str) -> Iterator[bytes]:
    """The bytes of a member, piece by piece; never more than its directory states.

    Raises:
        FetchError: corrupt, truncated, or bad_checksum, which is told when the last piece was handed out.
    """
    _seek_data(stream, member, place)
    count = crc = 0
    try:
        for piece in _inflated(member, _packed(stream, member, place)):
            count += len(piece)
            if count > member.size:
                break
            crc = zlib.crc32(piece, crc)
            yield piece
    except (zlib.error, lzma.LZMAError, OSError, ValueError, struct.error) as error:
        raise FetchError("corrupt", place, f"cannot be unpacked ({error}); fetch the archive again") from None
    if count != member.size:
        much = "more" if count > member.size else f"{count}"
        raise FetchError("corrupt", place, f"unpacks to {much} bytes where the archive states {member.size}")
    if crc != member.crc:
        text = f"CRC-32 {crc:08x} where the archive states {member.crc:08x}; fetch the archive again"
        raise FetchError("bad_checksum", place, text)


def _seek_data(stream: ReadAheadFile, member: ArchiveMember, place: str) -> None:
    """Set the stream to the data of a member, behind its local header."""
    stream.seek(member.offset)
    head = stream.read(_LOCAL.size)
    if len(head) < _LOCAL.size or not head.startswith(b"PK\3\4"):
        text = "its header is not where the directory says; the archive is damaged, or its parts are in another order"
        raise FetchError("corrupt", place, text)
    *_, name, extra = _LOCAL.unpack(head)
    stream.seek(member.offset + _LOCAL.size + name + extra)


def _packed(stream: ReadAheadFile, member: ArchiveMember, place: str) -> Iterator[bytes]:
    left = member.packed
    while left:
        chunk = stream.read(min(left, CHUNK))
        if not chunk:
            raise FetchError("truncated", place, f"the archive ends {left} bytes before the member does")
        left -= len(chunk)
        yield chunk


def _inflated(member: ArchiveMember, chunks: Iterable[bytes]) -> Iterator[bytes]:
    if member.method == 0:
        yield from chunks
    elif member.method == 8:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)
        for chunk in chunks:
            while not inflater.eof and ((piece := inflater.decompress(chunk, CHUNK)) or inflater.unconsumed_tail):
                chunk = inflater.unconsumed_tail
                yield piece
    else:
        inflater = bz2.BZ2Decompressor() if member.method == 12 else None
        for chunk in chunks:
            if inflater is None:
                inflater, chunk = _lzma(chunk, member.size)
            while not inflater.eof:
                yield inflater.decompress(chunk, CHUNK)
                if inflater.needs_input:
                    break
                chunk = b""


def _lzma(head: bytes, size: int) -> tuple[lzma.LZMADecompressor, bytes]:
    """A decompressor, and the first data behind the properties (APPNOTE 5.8.8) that it was made from."""
    _, length, packed, dictionary = struct.unpack_from("<HHBL", head)
    rest, lc = divmod(packed, 9)
    pb, lp = divmod(rest, 5)
    dictionary = min(dictionary, max(size, 4096))  # no more is ever needed
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": dictionary, "lc": lc, "lp": lp, "pb": pb}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), head[4 + length :]


# The directory --------------------------------------------------------------------------------------------------------


class _Directory(NamedTuple):
    start: int
    size: int
    shift: int  # bytes before the archive proper, such as a program that unpacks it
    starts: list[int]  # offsets of the parts that it was written in


def _tail(file: RandomAccessFile) -> bytes:
    """The end of a file, in which the end of a directory is; the directory itself lies before that."""
    size = min(_END64.size + _LOCATOR64.size + _END.size + _LONGEST_COMMENT, file.size)
    return file.read(file.size - size, size)


def _find_directory(file: RandomAccessFile) -> _Directory:
    fix = "it was cut, or its last part is missing or not the last one; fetch it again, and name all parts in order"
    tail = _tail(file)
    ends = {  # of comments
        match.start(): match.start() + _END.size + int.from_bytes(match[1], "little") for match in _ENDS.finditer(tail)
    }
    whole = [place for place, end in ends.items() if end == len(tail)]  # others may stand in a comment
    fitting = [place for place, end in ends.items() if end < len(tail)]  # something was added behind the archive
    if not whole + fitting:
        raise FetchError("truncated", file.name, f"the zip archive has no directory at its end: {fix}")
    place = whole[0] if whole else fitting[-1]
    _, disk, first_disk, _, _, size, offset, _ = _END.unpack_from(tail, place)
    if tail[max(place - _LOCATOR64.size, 0) : place].startswith(b"PK\6\7"):
        place -= _LOCATOR64.size + _END64.size
        if place < 0 or tail[place : place + 4] != b"PK\6\6":
            raise FetchError("corrupt", file.name, f"the end of the zip archive's directory is damaged: {fix}")
        *_, disk, first_disk, _, _, size, offset = _END64.unpack_from(tail, place)
    starts = file.starts if disk and isinstance(file, MultipartFile) else [0]
    if disk + 1 != len(starts):
        raise FetchError("truncated", file.name, f"the zip archive has {disk + 1} parts, here are {len(starts)}: {fix}")
    start = file.size - len(tail) + place - size
    shift = start - offset - starts[min(first_disk, disk)]
    if shift < 0:
        raise FetchError("truncated", file.name, f"{-shift} bytes of the zip archive are missing: {fix}")
    return _Directory(start, size, shift, starts)


def _entries(file: RandomAccessFile, directory: _Directory) -> Iterator[tuple[str, ArchiveMember, bool]]:
    """Path, member and whether it is a symbolic link, of all but folders."""
    end = directory.start + directory.size
    stream = ReadAheadFile(file, end)
    stream.seek(directory.start)
    while (place := stream.tell()) < end:
        entry = stream.read(_ENTRY.size)
        if len(entry) < _ENTRY.size or not entry.startswith(b"PK\1\2"):
            raise FetchError("corrupt", file.name, f"the zip archive's directory is damaged at byte {place}")
        fields = _ENTRY.unpack(entry)
        _, made, _, flags, method, _, _, crc, packed, size, *lengths, disk, _, attributes, offset = fields
        raw, extra, _ = (stream.read(length) for length in lengths)
        system = made >> 8
        name = _name(raw, flags, system)
        path = normalize_path(name)
        if path is None or name.endswith("/"):
            continue
        size, packed, offset, disk = _zip64(extra, size, packed, offset, disk)
        if disk >= len(directory.starts):
            raise FetchError("corrupt", file.name, f"the zip archive's directory names part {disk + 1} for {path}")
        offset += directory.starts[disk] + directory.shift
        refusal = "encrypted" if flags & _ENCRYPTED else "" if method in METHODS else "method"
        if offset + packed > directory.start or size > _LARGEST:
            refusal, offset, size, packed = "cut", 0, 0, 0
        is_link = system == _UNIX and stat.S_ISLNK(attributes >> 16)
        yield path, ArchiveMember(0, offset, size, packed, crc, method, refusal), is_link


def _zip64(extra: bytes, size: int, packed: int, offset: int, disk: int) -> list[int]:
    """The four numbers, each that did not fit taken from the Zip64 field (APPNOTE 4.5.3)."""
    values, place = [size, packed, offset, disk], 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, place)
        if kind == 1:
            field = extra[place + 4 : place + 4 + length]
            for number, (full, width) in enumerate(((_FULL, 8), (_FULL, 8), (_FULL, 8), (0xFFFF, 4))):
                if values[number] == full and len(field) >= width:
                    values[number], field = int.from_bytes(field[:width], "little"), field[width:]
        place += 4 + length
    return values


def _name(raw: bytes, flags: int, system: int) -> str:
    """A member's name: UTF-8 where it says so or can be, otherwise the code page that the format names."""
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = raw.decode("utf-8", "surrogateescape") if flags & _UTF8 else raw.decode("cp437")
    return name.replace("\\", "/") if system == _FAT and "/" not in name else name


def _follow(file: RandomAccessFile, path: str, member: ArchiveMember) -> ArchiveMember:
    """A symbolic link, whose data are the path that it leads to, with that path."""
    if member.size > _LONGEST_LINK:
        return member._replace(refusal="outside")
    try:
        text = b"".join(unpack_member(open_zip_stream(file, member), member, f"{file.name}: {path}"))
    except FetchError as error:
        if error.reason not in ("corrupt", "truncated", "bad_checksum"):
            raise
        return member._replace(refusal="cut")
    target = resolve_link(path, text.decode("utf-8", "surrogateescape"))
    return member._replace(link=target, refusal="" if target else "outside")
