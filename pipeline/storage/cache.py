"""Cache ranges of remote files on the local disk, shared by all processes of a machine, up to a limit.

``FOLDER/AB/CDEF...`` contains a CRC-32 of its key and bytes, and the bytes of one read. A file gets its name by a
rename under a lock (flock), which the system releases if the process ends. ``FOLDER/total`` counts the bytes of all
files. It is raised before a file appears, so a process killed at any time leaves a count that is right or too high. At
the limit, the least recently used files are deleted and the rest is counted again. Nothing waits for the cache: a read
that does not get the lock is not cached.
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

EVICT_TO = 0.8  #: share of the limit that remains after the oldest files are deleted
LOCK_TIMEOUT = 0.05  #: seconds to wait for the lock
CRC_BYTES = 4


class RangeCache:
    """Cache bytes by key in a folder that threads and processes share.

    Args:
        limit: bytes of all files together.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self._warned = False

    def has(self, key: str) -> bool:
        """Return whether something is cached under ``key``, without reading it."""
        return self._path(key).exists()

    def get(self, key: str) -> memoryview | None:
        """Return the bytes cached under ``key``, or None."""
        path = self._path(key)
        try:
            data = memoryview(path.read_bytes())
            os.utime(path)
        except OSError:
            return None
        check = int.from_bytes(data[:CRC_BYTES], "little")
        # damaged after a power cut or on a bad disk, or the file of another key
        if len(data) < CRC_BYTES or check != zlib.crc32(data[CRC_BYTES:], zlib.crc32(key.encode())):
            path.unlink(missing_ok=True)
            return None
        return data[CRC_BYTES:]

    def put(self, key: str, parts: Sequence[bytes | memoryview]) -> None:
        """Cache the concatenated ``parts``, unless another thread has the lock or they exceed the limit."""
        size = CRC_BYTES + sum(len(part) for part in parts)
        if size > self._limit:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked() as locked:
                if locked and not path.exists():
                    self._reserve(size)
                    self._write(path, parts, zlib.crc32(key.encode()))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"loader.cache: {self._folder}: {error.strerror}; reads are not cached", stacklevel=2)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / name[:2] / name[2:40]

    @contextlib.contextmanager
    def _locked(self) -> Iterator[bool]:
        """Yield whether the lock was acquired; it also excludes threads, because each opens the file itself."""
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            give_up_at = time.monotonic() + LOCK_TIMEOUT
            while not (acquired := _try_lock(descriptor)) and time.monotonic() < give_up_at:
                time.sleep(0.001)
            yield acquired
        finally:
            os.close(descriptor)

    def _reserve(self, size: int) -> None:
        """Count ``size`` more bytes, and delete old files if needed."""
        try:
            total = int((self._folder / "total").read_bytes())
        except (FileNotFoundError, ValueError):
            total = self._evict(self._limit - size)
        if total + size > self._limit:
            total = self._evict(min(int(self._limit * EVICT_TO), self._limit - size))
        (self._folder / "total").write_bytes(b"%d" % (total + size))

    def _evict(self, limit: int) -> int:
        """Delete the oldest files until the rest has at most ``limit`` bytes, and return its bytes."""
        files = []
        for folder in os.scandir(self._folder):
            if folder.is_dir(follow_symlinks=False):
                files += [(stat.st_mtime_ns, stat.st_size, path) for path, stat in _files(folder.path)]
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        return total

    def _write(self, path: Path, parts: Sequence[bytes | memoryview], check: int) -> None:
        temporary = self._folder / "writing"  # a fixed name, so that the file of a killed process is overwritten
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
