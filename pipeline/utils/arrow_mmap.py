"""Arrow tables in memory-mapped files, whose pages can be given back.

Every page of a map that was looked at counts as memory of the process until the kernel needs it for something else.
Random reads of a large table would so come to count all of it; :meth:`MappedTable.release` takes them off the count,
while they stay in the page cache, and :class:`PageLimit` says when. How much one look maps is up to the kernel, 4 kB to
megabytes; huge pages are refused.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

RELEASE = 64  #: chunks of a column after which the pages that were read are given back
LIMIT = 16 << 20  #: bytes of pages that random reads may hold
EVERY = 4  #: lookups after which they are counted


class MappedTable:
    """The table of an Arrow IPC file; its columns are views into the file.

    Raises:
        OSError, ValueError: the file cannot be read, or is none.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        self.table: pa.Table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()
        self.drop_pages()  # the headers of all batches

    def chunks(self, name: str) -> Iterator[pa.Array]:
        """The chunks of a column, of which no views are to be kept: their pages are given back on the way."""
        for number, chunk in enumerate(self.table[name].chunks, 1):
            yield chunk
            if number % RELEASE == 0:
                self.drop_pages()
        self.drop_pages()

    def array(self, name: str) -> np.ndarray:
        """A column of numbers without nulls, in one array of its own."""
        out, done = np.empty(len(self.table), dtype=self.table.schema.field(name).type.to_pandas_dtype()), 0
        for chunk in self.chunks(name):
            out[done : done + len(chunk)] = chunk.to_numpy()
            done += len(chunk)
        return out

    def drop_pages(self) -> None:
        """Give the pages back; whoever reads on gets them again, from the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


class ResidentPageLimiter:
    """Calls ``release`` when the files that this process has mapped have come to hold more than ``LIMIT`` bytes more.

    Usable from many threads: that counts are then about right is enough.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lookups, self._least = 0, _resident()

    def on_lookup(self) -> None:
        """To be called with every lookup of random rows."""
        self._lookups += 1
        if self._lookups % EVERY == 0 and _resident() - self._least > LIMIT:
            self._release()
            self._least = _resident()


def _resident() -> int:
    """Bytes of mapped files that count as memory of this process."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")
