"""A file object over :class:`~tools.fetch.source.Bytes`, which may lie far away: few reads, and little in vain.

What is read on end comes in blocks that double up to 8 MiB, small gaps included. A jump starts anew with a small block,
so walking over large members moves their headers and not their data.
"""

from __future__ import annotations

import io

from tools.fetch.source import Bytes

FIRST = 1 << 16  #: bytes read after a jump
MOST = 1 << 23  #: bytes read at once, unless more are asked for
GAP = 1 << 20  #: bytes that are rather read than jumped over


class ReadAhead(io.RawIOBase):
    """``file`` from its start; nothing behind ``stop`` is read unless it is asked for."""

    def __init__(self, file: Bytes, stop: int | None = None) -> None:
        self._file, self._stop = file, file.size if stop is None else stop
        self._place = 0
        self._start, self._block, self._buffer = 0, FIRST, b""

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

    def read(self, size: int = -1) -> bytes:
        """``size`` bytes from the current place, fewer only at the end of the file.

        Raises:
            ValueError: more than 8 MiB at once, which only a forged header makes its readers ask for.
        """
        if not 0 <= size <= MOST:
            raise ValueError(f"{size} bytes are asked for at once")
        data = self._at(self._place, size)
        self._place += len(data)
        return data

    def _at(self, offset: int, size: int) -> bytes:
        end = self._start + len(self._buffer)
        if not self._start <= offset <= offset + size <= end:
            near = self._start <= offset <= end + GAP and self._buffer
            self._block = min(2 * max(self._block, size), MOST) if near else FIRST
            kept = self._buffer[offset - self._start :] if near else b""
            ahead = min(self._block, self._stop - offset)
            place = offset + len(kept)
            self._buffer = kept + self._file.read(place, max(size, ahead) - len(kept))
            self._start = offset
        start = offset - self._start
        return self._buffer[start : start + size]
