"""Read members of zip archives at their offsets (PKWARE's APPNOTE.TXT 6.3.10).

zipfile keeps an object for every member: 1.1 GB for 2 million, in every process that opens the archive. Here the
central directory is read once, into a table, and a member is then found without it. Unlike zipfile, this module also
reads archives that were written in several parts (``zip -s``), and unpacks bzip2 and LZMA in bounded memory.

An archive is a sequence of members, each a local header and its data. The central directory follows, with an entry for
each member, then the end record. Archives over 4 GiB or 65,535 members also have a Zip64 end record and its locator.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import re
import stat
import struct
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from framestream.tools.fetch.archives.member_names import normalize_path
from framestream.tools.fetch.archives.member_table import UNKNOWN_METHOD, ArchiveMember, resolve_link
from framestream.tools.fetch.archives.multipart import MultipartFile
from framestream.tools.fetch.archives.readahead import CHUNK, ReadAheadFile, read_chunks
from framestream.tools.fetch.base import FetchError, RandomAccessFile

METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "LZMA"}
MAX_LINKS = 4096  #: symbolic links of an archive; the target of each has to be read from its data

_MAX_LINK_TARGET = 4096  # bytes
_MAX_COMMENT = (1 << 16) - 1  # bytes, after the end record
_MAX_SIZE = 1 << 62  # bytes of a member; a table cannot hold more
_LOCAL_SLACK = 1024  # bytes that are enough for the name and extra field of most local headers
_IN_ZIP64 = (1 << 32) - 1  # this value means that the number is in the Zip64 extra field

# Records, little-endian and without padding (APPNOTE section). Each begins with a signature of 4 bytes.
# Local header (4.3.7): version, flags, method, time, date; CRC, packed size, size; lengths of name and extra field.
_LOCAL = struct.Struct("<4s5H3L2H")
# Directory entry (4.3.12): made by, version, flags, method, time, date; CRC, packed size, size; lengths of name, extra
# field and comment, part number, internal attributes; external attributes, offset of the local header.
_ENTRY = struct.Struct("<4s6H3L5H2L")
# End record (4.3.16): this part, part of the directory, entries in this part, entries; size and offset of the
# directory; length of the comment.
_END = struct.Struct("<4s4H2LH")
# Zip64 end record (4.3.14): size of the record; made by, version; this part, part of the directory; entries in this
# part, entries, size and offset of the directory.
_END64 = struct.Struct("<4sQ2H2L4Q")
# Zip64 locator (4.3.15), directly before the end record: part and offset of the Zip64 end record, number of parts.
_LOCATOR64 = struct.Struct("<4sLQL")
_END_SIGNATURE = b"PK\5\6"
# An end record: its signature, 16 bytes, and the length of the comment that follows. The lookahead finds overlapping
# matches too, because the signature may also occur by chance within the record or in a comment.
_END_PATTERN = re.compile(rb"PK\x05\x06(?=.{16}(..))", re.S)
_ENCRYPTED = 1 << 0  # a flag
_UNIX = 3  # the system that an archive was created on


def list_zip(file: RandomAccessFile) -> Iterator[tuple[str, ArchiveMember]]:
    """Yield path and member of every file and link, in the order of the directory.

    Raises:
        FetchError: truncated, if the directory or parts of the archive are missing; corrupt.
    """
    directory = _find_directory(file)
    part_starts = file.starts if isinstance(file, MultipartFile) else [0]
    link_count = 0
    first: dict[int, tuple[str, ArchiveMember]] = {}  # the first member of each part, with its path
    for path, member, is_link in _entries(file, directory):
        part = bisect_right(part_starts, member.offset)
        if not member.refusal and (part not in first or member.offset < first[part][1].offset):
            first[part] = path, member
        if is_link and not member.refusal:
            link_count += 1
            if link_count > MAX_LINKS:
                message = f"has over {MAX_LINKS} symbolic links; pack the files instead"
                raise FetchError("unsupported", file.name, message)
            member = _resolve_symlink(file, path, member)
        yield path, member
    if len(first) > 1:  # parts in a wrong order are detected here, before a member is requested
        for path, member in first.values():
            _seek_data(ReadAheadFile(file, member.offset), member, f"{file.name}: {path}")


def is_zip(head: bytes) -> bool:
    """Return whether a file that starts with these bytes is a zip archive.

    The signatures are those of a local header, an empty archive, and the first part of an archive in several parts.
    """
    return head.startswith((b"PK\3\4", _END_SIGNATURE, b"PK\7\x08", b"PK00PK\3\4"))


def has_zip_directory(file: RandomAccessFile) -> bool:
    """Return whether a file ends like a zip archive, whatever it begins with."""
    return _END_SIGNATURE in _read_tail(file)


def open_zip_stream(file: RandomAccessFile, last: ArchiveMember) -> ReadAheadFile:
    """Return a stream for reading members up to ``last``, which reads little beyond it."""
    return ReadAheadFile(file, last.offset + _LOCAL.size + _LOCAL_SLACK + last.packed)


def unpack_member(stream: ReadAheadFile, member: ArchiveMember, location: str) -> Iterator[bytes]:
    """Yield the bytes of a member in chunks; never more than its directory entry states.

    Raises:
        FetchError: corrupt, truncated, or bad_checksum, which is raised after the last chunk.
    """
    _seek_data(stream, member, location)
    size = crc = 0
    try:
        for chunk in _decompress(member, read_chunks(stream, member.packed, location)):
            size += len(chunk)
            if size > member.size:
                break
            crc = zlib.crc32(chunk, crc)
            yield chunk
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError, MemoryError, struct.error) as error:
        raise FetchError("corrupt", location, f"cannot be unpacked ({error}); fetch the archive again") from None
    if size != member.size:
        unpacked = "more" if size > member.size else f"{size}"
        raise FetchError("corrupt", location, f"unpacks to {unpacked} bytes where the archive states {member.size}")
    if crc != member.crc:
        message = f"CRC-32 {crc:08x} where the archive states {member.crc:08x}; fetch the archive again"
        raise FetchError("bad_checksum", location, message)


def _seek_data(stream: ReadAheadFile, member: ArchiveMember, location: str) -> None:
    """Set the stream to the data of a member.

    They follow the local header, whose name and extra field may be longer than those of the directory.
    """
    stream.seek(member.offset)
    header = stream.read(_LOCAL.size)
    if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
        message = (
            "its header is not where the directory says; the archive is damaged, or its parts are in a wrong order"
        )
        raise FetchError("corrupt", location, message)
    *_, name_length, extra_length = _LOCAL.unpack(header)
    stream.seek(member.offset + _LOCAL.size + name_length + extra_length)


def _decompress(member: ArchiveMember, chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress chunks into chunks of at most CHUNK bytes, however much one of them unpacks to."""
    if member.method == 0:
        yield from chunks
    elif member.method == 8:
        inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # negative: raw deflate without a zlib header
        for chunk in chunks:
            while not inflater.eof and ((data := inflater.decompress(chunk, CHUNK)) or inflater.unconsumed_tail):
                chunk = inflater.unconsumed_tail
                yield data
    else:
        decompressor: bz2.BZ2Decompressor | lzma.LZMADecompressor | None = None
        for chunk in chunks:
            if decompressor is None:
                if member.method == 12:
                    decompressor = bz2.BZ2Decompressor()
                else:
                    decompressor, chunk = _open_lzma(chunk, member.size)
            while not decompressor.eof:
                yield decompressor.decompress(chunk, CHUNK)
                if decompressor.needs_input:
                    break
                chunk = b""


def _open_lzma(head: bytes, size: int) -> tuple[lzma.LZMADecompressor, bytes]:
    """Return a decompressor for the properties at the start of LZMA data, and the data after them (APPNOTE 5.8.8).

    The header is a version, the length of the properties, one byte ``(pb * 5 + lp) * 9 + lc``, and the dictionary size.
    """
    _, length, packed_properties, dictionary_size = struct.unpack_from("<HHBL", head)
    remainder, lc = divmod(packed_properties, 9)
    pb, lp = divmod(remainder, 5)
    # A dictionary larger than the member is never needed, and a forged size must not allocate memory.
    dictionary_size = min(dictionary_size, max(size, 4096))
    filters = [{"id": lzma.FILTER_LZMA1, "dict_size": dictionary_size, "lc": lc, "lp": lp, "pb": pb}]
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=filters), head[4 + length :]


# The central directory ------------------------------------------------------------------------------------------------


class _Directory(NamedTuple):
    start: int  # offset in the file
    size: int  # bytes
    shift: int  # bytes before the archive, such as a program that unpacks it
    part_starts: list[int]  # offsets of the parts that the archive was written in


def _read_tail(file: RandomAccessFile) -> bytes:
    """Return the end of a file, which contains all end records; the directory itself is before them."""
    size = min(_END64.size + _LOCATOR64.size + _END.size + _MAX_COMMENT, file.size)
    return file.read(file.size - size, size)


def _find_directory(file: RandomAccessFile) -> _Directory:
    fix = "it was cut, or its last part is missing or not the last one; fetch it again, and name all parts in order"
    tail = _read_tail(file)
    comment_ends = {  # where the comment of each possible end record ends, by the position of the record
        match.start(): match.start() + _END.size + int.from_bytes(match[1], "little")
        for match in _END_PATTERN.finditer(tail)
    }
    # The record whose comment ends with the file is the right one; others may be in its comment. If there is none,
    # bytes were added after the archive, and the last record whose comment fits counts.
    exact = [position for position, end in comment_ends.items() if end == len(tail)]
    fitting = [position for position, end in comment_ends.items() if end < len(tail)]
    if not exact + fitting:
        raise FetchError("truncated", file.name, f"the zip archive has no directory at its end: {fix}")
    position = exact[0] if exact else fitting[-1]
    _, last_part, first_part, _, _, size, offset, _ = _END.unpack_from(tail, position)
    if tail[max(position - _LOCATOR64.size, 0) : position].startswith(b"PK\6\7"):
        # The Zip64 end record is directly before its locator. The offset in the locator does not count bytes before
        # the archive, so it is not used.
        position -= _LOCATOR64.size + _END64.size
        if position < 0 or tail[position : position + 4] != b"PK\6\6":
            raise FetchError("corrupt", file.name, f"the end of the zip archive's directory is damaged: {fix}")
        *_, last_part, first_part, _, _, size, offset = _END64.unpack_from(tail, position)
    part_starts = file.starts if last_part and isinstance(file, MultipartFile) else [0]
    if last_part + 1 != len(part_starts):
        message = f"the zip archive has {last_part + 1} parts, here are {len(part_starts)}: {fix}"
        raise FetchError("truncated", file.name, message)
    # The directory ends where the end record begins. Its stated offset counts from its part; the difference to where it
    # really begins is what was put before the archive.
    start = file.size - len(tail) + position - size
    shift = start - offset - part_starts[min(first_part, last_part)]
    if shift < 0:
        raise FetchError("truncated", file.name, f"{-shift} bytes of the zip archive are missing: {fix}")
    return _Directory(start, size, shift, part_starts)


def _entries(file: RandomAccessFile, directory: _Directory) -> Iterator[tuple[str, ArchiveMember, bool]]:
    """Yield path, member and whether it is a symbolic link, of all entries but folders."""
    end = directory.start + directory.size
    stream = ReadAheadFile(file, end)
    stream.seek(directory.start)
    while (position := stream.tell()) < end:
        entry = stream.read(_ENTRY.size)
        if len(entry) < _ENTRY.size or not entry.startswith(b"PK\1\2"):
            raise FetchError("corrupt", file.name, f"the zip archive's directory is damaged at byte {position}")
        fields = _ENTRY.unpack(entry)
        _, made_by, _, flags, method, _, _, crc, packed, size, *lengths, part, _, attributes, offset = fields
        raw_name, extra, _ = (stream.read(length) for length in lengths)
        system = made_by >> 8
        name = _decode_name(raw_name, extra)
        path = normalize_path(name)
        if path is None or name.endswith(("/", "\\")):
            continue
        size, packed, offset, part = _apply_zip64(extra, size, packed, offset, part)
        if part >= len(directory.part_starts):
            raise FetchError("corrupt", file.name, f"the zip archive's directory names part {part + 1} for {path}")
        offset += directory.part_starts[part] + directory.shift
        refusal = "encrypted" if flags & _ENCRYPTED else "" if method in METHODS else "method"
        method = method if method in METHODS else UNKNOWN_METHOD  # of 16 bits, which the table cannot hold
        if offset + packed > directory.start or size > _MAX_SIZE:
            refusal, offset, size, packed = "cut", 0, 0, 0
        is_link = system == _UNIX and stat.S_ISLNK(attributes >> 16)  # the high 16 bits are the Unix mode
        yield path, ArchiveMember(0, offset, size, packed, crc, method, refusal), is_link


def _apply_zip64(extra: bytes, size: int, packed: int, offset: int, part: int) -> list[int]:
    """Return the four numbers; those that did not fit are taken from the Zip64 field (APPNOTE 4.5.3).

    The field contains only the numbers that did not fit, in this order: 8 bytes each for size, packed size and offset,
    4 bytes for the part.
    """
    values = [size, packed, offset, part]
    for data in _extra_fields(extra, kind=1):
        for number, (marker, width) in enumerate(((_IN_ZIP64, 8), (_IN_ZIP64, 8), (_IN_ZIP64, 8), (0xFFFF, 4))):
            if values[number] == marker and len(data) >= width:
                values[number], data = int.from_bytes(data[:width], "little"), data[width:]
    return values


def _extra_fields(extra: bytes, kind: int) -> Iterator[bytes]:
    """Yield the data of the fields of one kind. An extra field is a sequence of (kind, length, data)."""
    position = 0
    while position + 4 <= len(extra):
        found, length = struct.unpack_from("<2H", extra, position)
        if found == kind:
            yield extra[position + 4 : position + 4 + length]
        position += 4 + length


def _decode_name(raw: bytes, extra: bytes) -> str:
    """Return the name of a member: that of the Unicode path field if it belongs to ``raw``, or else ``raw`` as a path.

    The field is a version, the CRC-32 of the name that it replaces, and the name in UTF-8 (APPNOTE 4.6.9). Whether a
    name in the directory is UTF-8 is judged by its bytes: the flag for it is often missing.
    """
    for data in _extra_fields(extra, kind=0x7075):
        if data[:1] == b"\1" and data[1:5] == zlib.crc32(raw).to_bytes(4, "little"):
            with contextlib.suppress(UnicodeDecodeError):
                return data[5:].decode()
    return raw.decode("utf-8", "surrogateescape")


def _resolve_symlink(file: RandomAccessFile, path: str, member: ArchiveMember) -> ArchiveMember:
    """Return a symbolic link with the key of its target, which its data name."""
    if max(member.size, member.packed) > _MAX_LINK_TARGET:
        return member._replace(refusal="outside")
    try:
        target = b"".join(unpack_member(open_zip_stream(file, member), member, f"{file.name}: {path}"))
    except FetchError as error:
        if error.reason not in ("corrupt", "truncated", "bad_checksum"):
            raise
        return member._replace(refusal="cut")
    link = resolve_link(path, target.decode("utf-8", "surrogateescape"))
    return member._replace(link=link, refusal="" if link else "outside")
