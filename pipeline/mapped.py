"""Arrow tables in memory-mapped files, whose pages can be given back.

Every page of a map that was looked at counts as memory of the process until the kernel needs it for something else.
Random reads of a large table would so come to count all of it; :meth:`MappedTable.release` takes them off the count,
while they stay in the page cache. Huge pages are refused, or each look would count 2 MB.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

RELEASE = 64  #: chunks of a column after which the pages that were read are given back


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
        self.release()  # the headers of all batches

    def chunks(self, name: str) -> Iterator[pa.Array]:
        """The chunks of a column, of which no views are to be kept: their pages are given back on the way."""
        for number, chunk in enumerate(self.table[name].chunks, 1):
            yield chunk
            if number % RELEASE == 0:
                self.release()
        self.release()

    def array(self, name: str) -> np.ndarray:
        """A column of numbers without nulls, in one array of its own."""
        out, done = np.empty(len(self.table), dtype=self.table.schema.field(name).type.to_pandas_dtype()), 0
        for chunk in self.chunks(name):
            out[done : done + len(chunk)] = chunk.to_numpy()
            done += len(chunk)
        return out

    def release(self) -> None:
        """Give the pages back; whoever reads on gets them again, from the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)
