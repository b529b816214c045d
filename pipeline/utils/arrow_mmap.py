"""Arrow tables in memory-mapped files, whose resident pages can be dropped.

Every page of a map that has been read counts as memory of the process, until the kernel needs it for something else.
With random reads, all of a large table would be counted at last. :meth:`MappedTable.drop_pages` removes the pages from
the process; they stay in the page cache. :class:`ResidentPageLimiter` decides when. The kernel decides how much one
read maps, from 4 kB to megabytes. Huge pages are switched off.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.interrupts import hold_interrupts

DROP_EVERY = 64  #: chunks of a column after which the pages that were read are dropped
LIMIT = 16 << 20  #: bytes of pages that random reads may keep resident
CHECK_EVERY = 4  #: lookups after which they are counted

with hold_interrupts():
    pa.chunked_array([[0]]).to_numpy()  # the first conversion tries to import pandas, and drops every exception


class MappedTable:
    """The table of an Arrow IPC file; its columns are views into the file.

    The file is checked before anything is read of it: Arrow follows lengths and offsets of a damaged file into memory
    that is not its own.

    Args:
        path: of the file.
        digest: as of :func:`framestream.pipeline.utils.digests.file_digest`; None if it is not known.
        checked: another process has checked the file, so that it is only opened.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or is not an Arrow file; one line that names it.
    """

    def __init__(self, path: str | Path, digest: str | None = None, checked: bool = False) -> None:
        self.path = str(path)
        if digest is not None and not checked and file_digest(path) != digest:
            raise ValueError(f"{path}: damaged (its digest differs from the one that was recorded)")
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise ValueError(f"{path}: empty, not an Arrow file")
            # private: some file systems have no shared maps
            self._map = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        with contextlib.suppress(OSError):  # the kernel has no huge pages
            self._map.madvise(mmap.MADV_NOHUGEPAGE)
        try:
            self.table: pa.Table = self._open(checked)
        except (pa.ArrowException, MemoryError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: damaged, or not an Arrow file ({reason[:200]})") from None
        self.drop_pages()  # those of the headers of all batches

    def __reduce__(self) -> tuple:
        """Pickle the path: another process of this machine maps the file again."""
        return MappedTable, (self.path, None, True)

    def _open(self, checked: bool) -> pa.Table:
        """Open the table. Its batches are validated one by one, so that few of their pages are in memory at a time."""
        reader = pa.ipc.open_file(pa.py_buffer(self._map))
        if not checked:
            for number in range(reader.num_record_batches):
                reader.get_batch(number).validate(full=True)
                if number % DROP_EVERY == 0:
                    self.drop_pages()
        return reader.read_all()

    def chunks(self, name: str) -> Iterator[pa.Array]:
        """Yield the chunks of a column. Do not keep views of them: their pages are dropped on the way."""
        for number, chunk in enumerate(self.table[name].chunks, 1):
            yield chunk
            if number % DROP_EVERY == 0:
                self.drop_pages()
        self.drop_pages()

    def array(self, name: str) -> np.ndarray:
        """Copy a column of numbers without nulls into one array."""
        dtype = pa.array([], self.table.schema.field(name).type).to_numpy(zero_copy_only=False).dtype
        out, filled = np.empty(len(self.table), dtype=dtype), 0
        for chunk in self.chunks(name):
            out[filled : filled + len(chunk)] = chunk.to_numpy()
            filled += len(chunk)
        return out

    def drop_pages(self) -> None:
        """Remove the pages from the process; later reads get them again from the page cache."""
        self._map.madvise(mmap.MADV_DONTNEED)


class ResidentPageLimiter:
    """Call ``release`` when the resident pages of mapped files have grown by more than ``LIMIT`` bytes.

    Threads may share it: their counts are then approximate, which is enough.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lookups, self._baseline = 0, _resident()

    def on_lookup(self) -> None:
        """Count a lookup of random rows; call it for each."""
        self._lookups += 1
        if self._lookups % CHECK_EVERY == 0 and _resident() - self._baseline > LIMIT:
            self._release()
            self._baseline = _resident()


def _resident() -> int:
    """Return the bytes of mapped files that count as memory of this process."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[2]) * os.sysconf("SC_PAGE_SIZE")
