"""A file object over :class:`~framestream.tools.fetch.base.Bytes`, which may lie far away: few reads, and little in vain.

What is read on end comes in blocks that double up to 8 MiB, small gaps included. A jump starts anew with a small block,
so walking over large members moves their headers and not their data.
"""

from __future__ import annotations

import io

from framestream.tools.fetch.base import RandomAccessFile

FIRST_BLOCK = 1 << 16  #: bytes read after a jump
MAX_READ = 1 << 23  #: bytes read at once, unless more are asked for
MAX_GAP = 1 << 20  #: bytes that are rather read than jumped over


class RandomAccessStream(io.RawIOBase):
    """``file`` from its start, for libraries that take files; what reads is left to others."""

    def __init__(self, file: RandomAccessFile) -> None:
        self._file, self._place = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        if place < 0:
            raise ValueError(f"seek to {place}")
        self._place = place
        return place


class ReadAheadFile(RandomAccessStream):
    """``file`` from its start; nothing behind ``stop`` is read unless it is asked for."""

    def __init__(self, file: RandomAccessFile, stop: int | None = None) -> None:
        super().__init__(file)
        self._stop = file.size if stop is None else stop
        self._size = FIRST_BLOCK  # of the next block
        self._blocks = [(0, b"")]  # the last two, newest first, with their offsets: gzip is read back and forth

    def read(self, size: int = -1) -> bytes:
        """``size`` bytes from the current place, fewer only at the end of the file.

        Raises:
            ValueError: more than 8 MiB at once, which only a forged header makes its readers ask for.
        """
        if not 0 <= size <= MAX_READ:
            raise ValueError(f"{size} bytes are asked for at once")
        data = self._at(self._place, size)
        self._place += len(data)
        return data

    def _at(self, offset: int, size: int) -> bytes:
        for start, block in self._blocks:
            if start <= offset and offset + size <= start + len(block):
                return block[offset - start : offset - start + size]
        start, block = self._blocks[0]
        near = bool(block) and start <= offset <= start + len(block) + MAX_GAP
        self._size = min(2 * max(self._size, size), MAX_READ) if near else FIRST_BLOCK
        kept = block[offset - start :] if near else b""
        ahead = min(self._size, self._stop - offset)
        block = kept + self._file.read(offset + len(kept), max(size, ahead) - len(kept))
        self._blocks = [(offset, block), self._blocks[0]]
        return block[:size]
