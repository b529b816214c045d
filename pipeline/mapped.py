"""Arrow tables in memory-mapped files, whose pages can be given back.

Every page of a map that was looked at counts as memory of the process until the kernel needs it for something else.
Random reads of a large table would so come to count all of it; :meth:`MappedTable.release` takes them off the count,
while they stay in the page cache.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import pyarrow as pa


class MappedTable:
    """The table of an Arrow IPC file; its columns are views into the file.

    Raises:
        OSError, ValueError: the file cannot be read, or is none.
    """

    def __init__(self, path: str | Path) -> None:
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.table: pa.Table = pa.ipc.open_file(pa.py_buffer(self._map)).read_all()

    def release(self) -> None:
        """Give the pages back; whoever reads on gets them again, from the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)
