"""Read roots that are local folders: ranges by ``pread`` from files that stay open."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from framestream.pipeline.storage.base import ReadOptions, ShardRef

PIECE = 1 << 20  #: bytes of a file that are yielded at once, at most, when it is read in order
OPEN_FILES = 128  #: open files per root and process
STALE = (errno.ESTALE, errno.EBADF, errno.EIO)  #: errors of an open file that may pass when it is opened again


class LocalStorage:
    """The files of a folder (see :class:`framestream.pipeline.storage.base.Storage`)."""

    remote = False

    def __init__(self, root: str | os.PathLike[str], options: ReadOptions) -> None:
        self.root = Path(root)
        self._options = options
        self._open: dict[str, _File] = {}
        self._lock = threading.Lock()

    @property
    def derived_folders(self) -> list[Path]:
        return [self.root / "index", self._options.root_folder(os.path.realpath(self.root))]

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        return (self._read(shard.name, *part) for part in ranges)  # lazily: one range at a time fits the cache

    def prefetch(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> bool:
        return False

    def read_in_order(self, shard: ShardRef, offset: int, size: int) -> Iterator[bytes]:
        for position in range(offset, offset + size, PIECE):
            yield self._read(shard.name, position, min(PIECE, offset + size - position))

    def read_all(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        return [self.root / name for name in names]

    def describe(self, name: str) -> Path:
        return self.root / name

    def _read(self, name: str, offset: int, size: int) -> bytes:
        """Read a range. If the open file has become stale or short, such as by a replacement, open it again once."""
        file = self._file(name)
        try:
            return file.read(offset, size)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in STALE:
                raise
            with self._lock:
                if self._open.get(name) is file:
                    del self._open[name]
            return self._file(name).read(offset, size)

    def _file(self, name: str) -> _File:
        """Return an open file; an evicted one is closed when its last reader drops it."""
        with self._lock:
            if file := self._open.pop(name, None):
                self._open[name] = file  # now the last to be evicted
                return file
        file = _File(self.root / name)  # without the lock, because a network file system may hang here
        with self._lock:
            self._open[name] = file
            if len(self._open) > OPEN_FILES:
                del self._open[next(iter(self._open))]
            return file


class _File:
    """A file open for ranged reads; closed when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        self._descriptor = -1  # for __del__, if open fails
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        """Close the file, with a function that is still there when the interpreter has dropped this module."""
        if self._descriptor >= 0:
            try:
                close(self._descriptor)
            except OSError:  # the file has become stale
                return

    def read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise ValueError(f"the shard ends within the {size} bytes at {offset}; build it again")
            data += more
        return data
