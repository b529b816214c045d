"""File objects over a :class:`~framestream.tools.fetch.base.RandomAccessFile`, with read-ahead for remote files.

Sequential reads fetch blocks that double up to 8 MiB, and small gaps are read over. A jump starts with a small block
again. A walk over the headers of large members therefore transfers little of their data.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Protocol

from framestream.tools.fetch.base import FetchError, RandomAccessFile

CHUNK = 1 << 20  #: bytes yielded at once, at most
FIRST_BLOCK = 1 << 16  #: bytes read after a jump
MAX_READ = 1 << 23  #: bytes read at once, at most
MAX_GAP = 2 * FIRST_BLOCK  #: bytes that are read over instead of starting with a small block


class SeekableReader(Protocol):
    """What is read of a file object here."""

    def seek(self, offset: int, /) -> int:
        """Set and return the position."""

    def read(self, size: int, /) -> bytes:
        """Return ``size`` bytes from the position, fewer only at the end."""


def read_chunks(stream: SeekableReader, size: int, location: str) -> Iterator[bytes]:
    """Yield the next ``size`` bytes of a stream in chunks.

    Raises:
        FetchError: truncated.
    """
    remaining = size
    while remaining:
        chunk = stream.read(min(remaining, CHUNK))
        if not chunk:
            raise FetchError("truncated", location, f"the archive ends {remaining} bytes before the member does")
        remaining -= len(chunk)
        yield chunk


class RandomAccessStream(io.RawIOBase):
    """A file object with a position, for libraries that take file objects. Subclasses read."""

    def __init__(self, file: RandomAccessFile) -> None:
        self._file, self._position = file, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set and return the position, which may be beyond the end of the file."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        if position < 0:
            raise ValueError(f"seek to {position}")
        self._position = position
        return position


class ReadAheadFile(RandomAccessStream):
    """A file object that reads ahead, but not beyond ``stop`` unless a read asks for it."""

    def __init__(self, file: RandomAccessFile, stop: int | None = None) -> None:
        super().__init__(file)
        self._stop = file.size if stop is None else stop
        self._block_size = FIRST_BLOCK  # of the next block
        # The last two blocks with their offsets, newest first. Two, because gzip is read back and forth.
        self._blocks = [(0, b"")]

    def read(self, size: int = -1) -> bytes:
        """Return ``size`` bytes from the position, fewer only at the end of the file.

        Raises:
            ValueError: more than 8 MiB at once, which readers only ask for if a header is forged.
        """
        if not 0 <= size <= MAX_READ:
            raise ValueError(f"a read of {size} bytes at once")
        data = self._read_at(self._position, size)
        self._position += len(data)
        return data

    def _read_at(self, offset: int, size: int) -> bytes:
        for start, block in self._blocks:
            if start <= offset and offset + size <= start + len(block):
                return block[offset - start : offset - start + size]
        start, block = self._blocks[0]
        is_sequential = bool(block) and start <= offset <= start + len(block) + MAX_GAP
        self._block_size = min(2 * max(self._block_size, size), MAX_READ) if is_sequential else FIRST_BLOCK
        overlap = block[offset - start :] if is_sequential else b""  # bytes of the new block that were read before
        ahead = min(self._block_size, self._stop - offset)
        block = overlap + self._file.read(offset + len(overlap), max(size, ahead) - len(overlap))
        self._blocks = [(offset, block), self._blocks[0]]
        return block[:size]
