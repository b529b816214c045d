"""Copy complete shards to the local disk when they are first read, each over one request, and read them there.

Roots on disks and lines that are slow at many small reads are read so with ``loader.access: sequential``. Copies are
named by the digest of their contents, so several roots, processes and runs share them. The least recently used ones are
deleted for a new one. A copy gets its name by a rename after its digest was checked, so a killed process leaves none in
part.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from framestream.pipeline.config.loading import NO_ROOM_FOR_COPIES
from framestream.pipeline.storage.base import ReadOptions, ReadOptionsError, ShardRef, Storage
from framestream.pipeline.utils.atomic_io import atomic_file
from framestream.pipeline.utils.locks import LockError, LockHeldError, lock_file


class CopyingStorage:
    """The files of another storage, its shards read from local copies (see :class:`Storage`).

    Raises:
        ReadOptionsError: the options leave no room for copies, or their folder cannot be written.
    """

    def __init__(self, storage: Storage, options: ReadOptions) -> None:
        if not options.cache_gb:
            raise ReadOptionsError(f"loader.access: {NO_ROOM_FOR_COPIES}")
        self._storage, self._options = storage, options
        self._folder = options.cache_folder / "shards"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
        except OSError as error:
            fault = f"cannot be written ({error.strerror})"
            fix = "name another folder, or set loader.access: ranges"
            raise ReadOptionsError(f"loader.cache: {self._folder}: {fault}; {fix}") from None

    @property
    def root(self) -> Path | str:
        return self._storage.root

    @property
    def remote(self) -> bool:
        return self._storage.remote

    @property
    def derived_folders(self) -> list[Path]:
        return self._storage.derived_folders

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        if not shard.digest:
            return [bytes(part) for part in self._storage.read(shard, ranges)]
        for _ in range(3):  # another process may delete the copy between the two lines
            self._ensure(shard)
            with contextlib.suppress(FileNotFoundError), open(self._folder / shard.digest, "rb") as file:
                return [os.pread(file.fileno(), size, offset) for offset, size in ranges]
        raise OSError(f"{self.describe(shard.name)}: its copy is deleted again and again; raise loader.cache_gb")

    def prefetch(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> bool:
        return False

    def read_in_order(self, shard: ShardRef, offset: int, size: int) -> Iterator[bytes]:
        return self._storage.read_in_order(shard, offset, size)

    def read_all(self, name: str) -> bytes:
        return self._storage.read_all(name)

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        return self._storage.local_copy(names, version, check)

    def describe(self, name: str) -> Path | str:
        return self._storage.describe(name)

    def _ensure(self, shard: ShardRef) -> None:
        """Copy a shard unless its copy is there. Others that need it wait for it."""
        path = self._folder / shard.digest
        if self._touch(path):
            return
        self._options.check_copies(self.describe(shard.name), shard.size)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with lock_file(self._lock(path), "copy", wait=True):
                if not self._touch(path):
                    self._make_room(shard.size)
                    self._copy(shard, path)
                self._lock(path).unlink(missing_ok=True)
        except LockError as error:
            raise OSError(f"loader.cache: {error}") from None
        except OSError as error:
            if error.strerror is None:  # of the other storage, with a complete message
                raise
            fix = "free space, or name another folder"
            raise OSError(f"loader.cache: {self._folder}: {error.strerror}; {fix}") from None

    @staticmethod
    def _lock(path: Path) -> Path:
        """Return the file that is locked while the copy ``path`` is made."""
        return path.with_name(f"{path.name}.lock")

    def _touch(self, path: Path) -> bool:
        """Mark a copy as used; return whether it is there."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _copy(self, shard: ShardRef, path: Path) -> None:
        digest = hashlib.sha256()
        with atomic_file(path) as file:
            for piece in self._storage.read_in_order(shard, 0, shard.size):
                digest.update(piece)
                file.write(piece)
            if digest.hexdigest() != shard.digest:
                fault = "damaged (its sha256 is not the one in the index); restore the shard"
                raise ValueError(f"{self.describe(shard.name)}: {fault}")

    def _make_room(self, size: int) -> None:
        """Delete what was not used for longest, and is not being copied, until another copy of ``size`` bytes fits."""
        with lock_file(self._folder / "lock", "copy", wait=True):
            found = []
            for entry in os.scandir(self._folder):
                if entry.name.endswith("lock"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found.append((entry.stat().st_mtime_ns, entry.stat().st_size, Path(entry.path)))
            total = sum(held for _, held, _ in found)
            for _, held, path in sorted(found):
                if total + size <= self._options.cache_bytes:
                    return
                if path.suffix != ".tmp" or not self._is_copied(path.with_suffix("")):
                    path.unlink(missing_ok=True)
                    total -= held

    def _is_copied(self, path: Path) -> bool:
        """Return whether a process copies ``path``; a killed one has left its part."""
        try:
            with lock_file(self._lock(path), "copy"):
                self._lock(path).unlink()
                return False
        except LockHeldError:
            return True
