"""A shard's tar read strictly, front to end: every byte of it is a member, or what docs/format.md puts around members.

No number in the file is trusted: sizes are bounded by the file's length, and one sample is in memory at a time.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, NamedTuple

BLOCK, RECORD = 512, 10_240  #: bytes that members and files are rounded up to
PIECE = 1 << 20  #: bytes read at once where they are only hashed
#: Fields of a header, with the place of their first byte.
FIELDS = {"name": 0, "mode": 100, "uid": 108, "gid": 116, "size": 124, "mtime": 136, "checksum": 148, "type": 156}
FIELDS |= {"link": 157, "magic": 257, "owner": 265, "device": 329, "prefix": 345}


class UnreadableTarError(Exception):
    """The rest of a tar cannot be read."""


class TarMember(NamedTuple):
    """A member: its name, where its header and its data begin in the file, and the data."""

    name: str
    header: int
    place: int
    data: bytes


class PlainTar:
    """A tar that is read once; ``report(member, what)`` is told of what is wrong and does not stop the reading."""

    def __init__(self, file: BinaryIO, report: Callable[[str, str], None]) -> None:
        self._file, self._report = file, report
        self._digests = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        self.place, self.size = 0, file.seek(0, 2)
        self.offsets: list[int] = []  #: header of each sample's first member; at the end also the last member's end
        file.seek(0)

    def samples(self, extensions: Sequence[str]) -> Iterator[tuple[str, list[TarMember]]]:
        """Key and members of each sample.

        Raises:
            Unreadable: no tar from here on, or the members of a sample are not side by side.
        """
        members = self._members()
        while sample := list(itertools.islice(members, len(extensions))):
            key = sample[0].name.partition(".")[0]
            wanted = [f"{key}.{extension}" for extension in extensions]
            if [member.name for member in sample] != wanted:
                there = " ".join(member.name for member in sample)
                raise UnreadableTarError(f"the members {there} stand where {' '.join(wanted)} should")
            self.offsets.append(sample[0].header)
            yield key, sample

    def digests(self) -> tuple[str, str]:
        """Sha256 and md5 of the whole file, in hex; the rest of it is read first.

        Raises:
            Unreadable: the file became shorter.
        """
        self._rest()
        return self._digests[0].hexdigest(), self._digests[1].hexdigest()

    def _members(self) -> Iterator[TarMember]:
        while any(block := self._read(BLOCK)):
            header = self.place - BLOCK
            size = _octal(block[FIELDS["size"] : FIELDS["mtime"]])
            if size is None or _octal(block[148:156]) != _checksum(block):
                raise UnreadableTarError(f"no tar header stands at byte {header:,}")
            name = block[:100].rstrip(b"\0")
            shown, expected = name.decode("ascii", "backslashreplace"), plain_header(name, size)
            if block != expected:
                ends = [*FIELDS.values(), BLOCK][1:]
                places = zip(FIELDS.items(), ends, strict=True)
                odd = [field for (field, start), end in places if block[start:end] != expected[start:end]]
                self._report(shown, f"its tar header is not the plain one ({', '.join(odd)})")
            place, data = self.place, self._read(size)
            if any(self._read(-size % BLOCK)):
                self._report(shown, "its last block is not filled up with zeros")
            yield TarMember(shown, header, place, data)
        last = self.place - BLOCK
        self.offsets.append(last)
        if self._rest() or self.size != -(-(last + 2 * BLOCK) // RECORD) * RECORD:
            self._report("", "what follows its last member is not two blocks of zeros, then zeros up to 10,240 bytes")

    def _read(self, size: int) -> bytes:
        if size > self.size - self.place:
            raise UnreadableTarError(f"the file ends within the {size:,} bytes that begin at byte {self.place:,}")
        data = self._file.read(size)
        if len(data) < size:
            raise UnreadableTarError("the file became shorter while it was read")
        for digest in self._digests:
            digest.update(data)
        self.place += size
        return data

    def _rest(self) -> bool:
        """Read the rest; whether anything but zeros is in it."""
        other = False
        while self.place < self.size:
            other |= any(self._read(min(PIECE, self.size - self.place)))
        return other


def plain_header(name: bytes, size: int) -> bytes:
    """The one header that a member of this name and size has in a shard."""
    texts = {"name": name, "mode": b"0000644", "uid": b"0000000", "gid": b"0000000", "size": b"%011o" % size}
    texts |= {"mtime": b"0" * 11, "checksum": b" " * 8, "type": b"0", "magic": b"ustar\x0000"}
    block = bytearray(BLOCK)
    for field, text in texts.items():
        block[FIELDS[field] : FIELDS[field] + len(text)] = text
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _checksum(block: bytes) -> int:
    """Sum of a header's bytes, with spaces in place of the checksum."""
    return sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _octal(field: bytes) -> int | None:
    digits = field.rstrip(b"\0 ")
    return int(digits, 8) if re.fullmatch(rb"[0-7]{1,11}", digits) else None
