"""Strict reader for the tar of one shard.

Every byte of the file must belong to a member or to the padding that docs/format.md describes. Numbers in the file are
not trusted: sizes are bounded by the file's length, and only one sample is in memory at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

BLOCK, RECORD = 512, 10_240  #: bytes that members and files are rounded up to
CHUNK = 1 << 20  #: bytes read at once where they are only hashed
#: Fields of a header, with the offset of their first byte.
FIELDS = {"name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "checksum": 148, "type": 156}
FIELDS |= {"link": 157, "magic": 257, "owner": 265, "device": 329, "prefix": 345}


class UnreadableTarError(Exception):
    """The rest of a tar cannot be read."""


class TarMember(NamedTuple):
    """One member: its name, the file offsets of its header and of its data, and the data."""

    name: str
    header_offset: int
    data_offset: int
    data: bytes


class PlainTar:
    """Read a tar once, front to end.

    Args:
        report: called as ``report(member, problem)`` for problems that do not stop the reading.
    """

    def __init__(self, file: BinaryIO, report: Callable[[str, str], None]) -> None:
        self._file, self._report = file, report
        self._digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.offset, self.size = 0, file.seek(0, 2)
        #: Offset of the header of each sample's first member. At the end also the end of the last member.
        self.sample_offsets: list[int] = []
        file.seek(0)

    def samples(self, extensions: Sequence[str]) -> Iterator[tuple[str, list[TarMember]]]:
        """Yield the key and the members of each sample.

        Raises:
            UnreadableTarError: the rest is not a tar, or the members of a sample are not adjacent.
        """
        members = self._members()
        while sample := list(itertools.islice(members, len(extensions))):
            key = sample[0].name.partition(".")[0]
            expected = [f"{key}.{extension}" for extension in extensions]
            if [member.name for member in sample] != expected:
                actual = " ".join(member.name for member in sample)
                raise UnreadableTarError(f"found the members {actual}, expected {' '.join(expected)}")
            self.sample_offsets.append(sample[0].header_offset)
            yield key, sample

    def digests(self) -> tuple[str, str]:
        """Read the rest of the file and return the sha256 and md5 of all of it, in hex.

        Raises:
            UnreadableTarError: the file became shorter.
        """
        self._read_rest()
        return self._digests[0].hexdigest(), self._digests[1].hexdigest()

    def _members(self) -> Iterator[TarMember]:
        while any(block := self._read(BLOCK)):
            header_offset = self.offset - BLOCK
            size = _parse_octal(block[FIELDS["size"] : FIELDS["mtime"]])
            if size is None or _parse_octal(block[148:156]) != _checksum(block):
                raise UnreadableTarError(f"no valid tar header at byte {header_offset:,}")
            raw_name = block[:100].rstrip(b"\0")
            name, expected = raw_name.decode("ascii", "backslashreplace"), plain_header(raw_name, size)
            if block != expected:
                ends = [*FIELDS.values(), BLOCK][1:]
                spans = zip(FIELDS.items(), ends, strict=True)
                wrong = [field for (field, start), end in spans if block[start:end] != expected[start:end]]
                self._report(name, f"its tar header is not as in the format ({', '.join(wrong)})")
            data_offset, data = self.offset, self._read(size)
            if any(self._read(-size % BLOCK)):
                self._report(name, "the padding of its last block is not zeros")
            yield TarMember(name, header_offset, data_offset, data)
        end = self.offset - BLOCK
        self.sample_offsets.append(end)
        # two blocks of zeros end a tar, and the file is padded to a multiple of RECORD
        if self._read_rest() or self.size != -(-(end + 2 * BLOCK) // RECORD) * RECORD:
            self._report("", "its last member is not followed by two blocks of zeros and zeros up to 10,240 bytes")

    def _read(self, size: int) -> bytes:
        if size > self.size - self.offset:
            raise UnreadableTarError(f"the file ends within the {size:,} bytes that begin at byte {self.offset:,}")
        data = self._file.read(size)
        if len(data) < size:
            raise UnreadableTarError("the file became shorter while it was read")
        for digest in self._digests:
            digest.update(data)
        self.offset += size
        return data

    def _read_rest(self) -> bool:
        """Read the rest of the file. Return whether it has any byte other than zero."""
        other = False
        while self.offset < self.size:
            other |= any(self._read(min(CHUNK, self.size - self.offset)))
        return other


def plain_header(name: bytes, size: int) -> bytes:
    """Return the only header that a member with this name and size may have in a shard."""
    texts = {"name": name, "mode": b"0000644", "uid": b"0000000", "gid": b"0000000", "size": b"%011o" % size}
    texts |= {"mtime": b"0" * 11, "checksum": b" " * 8, "type": b"0", "magic": b"ustar\x0000"}
    block = bytearray(BLOCK)
    for field, text in texts.items():
        block[FIELDS[field] : FIELDS[field] + len(text)] = text
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _checksum(block: bytes) -> int:
    """Sum the bytes of a header, with the checksum field counted as spaces."""
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _parse_octal(field: bytes) -> int | None:
    digits = field.rstrip(b"\0 ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,11}", digits) else None
