"""Ranges of remote files kept on the local disk, shared by all processes of a machine, within a bound.

``FOLDER/AB/CDEF...`` is a CRC-32 and the bytes of one read. It takes its name by a rename under a lock (flock), which
ends with the process that holds it. ``FOLDER/total`` counts the bytes of all files and is raised before one appears, so
that a process killed at any moment leaves a count that is right or too high. When the bound is reached the files used
least recently go, and the count is made anew. Nothing waits for the cache: without the lock a read is not kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

KEPT = 0.8  #: share of the bound that is left when the oldest files go
PATIENCE = 0.05  #: seconds to wait for the lock
CRC_BYTES = 4


class RangeCache:
    """Bytes by key; threads and processes share one folder.

    Args:
        bound: bytes of all files together.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self._folder, self._bound = folder, bound
        self._warned = False

    def get(self, key: str) -> memoryview | None:
        """What was kept under ``key``, or None."""
        path = self._path(key)
        try:
            data = memoryview(path.read_bytes())
            os.utime(path)
        except OSError:
            return None
        if int.from_bytes(data[:CRC_BYTES], "little") != zlib.crc32(data[CRC_BYTES:]):  # of a power cut, or a bad disk
            path.unlink(missing_ok=True)
            return None
        return data[CRC_BYTES:]

    def put(self, key: str, parts: Sequence[bytes | memoryview]) -> None:
        """Keep the bytes of ``parts``, one after the other, unless others hold the lock or they are too many."""
        size = CRC_BYTES + sum(len(part) for part in parts)
        if size > self._bound:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as locked:
                if locked and not path.exists():
                    self._reserve(size)
                    self._write(path, parts)
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"loader.cache: {self._folder}: {error.strerror}; reads are not kept", stacklevel=2)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name[2:40]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Whether the lock was had; it excludes threads too, since each opens the file anew."""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            until = time.monotonic() + PATIENCE
            while not (had := _try_lock(descriptor)) and time.monotonic() < until:
                time.sleep(0.001)
            yield had
        finally:
            os.close(descriptor)

    def _reserve(self, size: int) -> None:
        """Count ``size`` more bytes, and make room for them."""
        try:
            total = int((self._folder / "total").read_bytes())
        except (FileNotFoundError, ValueError):
            total = self._evict(self._bound - size)
        if total + size > self._bound:
            total = self._evict(min(int(self._bound * KEPT), self._bound - size))
        (self._folder / "total").write_bytes(b"%d" % (total + size))

    def _evict(self, bound: int) -> int:
        """Bytes of all files, after the oldest are removed until they are at most ``bound``."""
        files = []
        for folder in os.scandir(self._folder):
            if folder.is_dir(follow_symlinks=False):
                files += [(stat.st_mtime_ns, stat.st_size, path) for path, stat in _files(folder.path)]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= bound:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _write(self, path: Path, parts: Sequence[bytes | memoryview]) -> None:
        temporary = self._folder / "writing"  # one name, so that the process that follows a killed one takes it over
        check = 0
        for part in parts:
            check = zlib.crc32(part, check)
        try:
            with open(temporary, "wb") as file:
                file.writelines([check.to_bytes(CRC_BYTES, "little"), *parts])
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _files(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            yield entry.path, entry.stat(follow_symlinks=False)
