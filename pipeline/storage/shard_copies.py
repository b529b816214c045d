"""Copy complete shards to the local disk when they are first read, each over one request, and read them there.

Roots on disks and lines that are slow at many small reads are read so with ``loader.access: sequential``. Copies are
named by the digest of their contents, so several roots, processes and runs share them. The least recently used ones are
deleted for a new one. A copy gets its name by a rename after its digest was checked, so a killed process leaves none in
part.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from framestream.pipeline.storage.base import ReadOptions, ShardRef, Storage


class CopyingStorage:
    """The files of another storage, its shards read from local copies (see :class:`Storage`).

    Raises:
        ValueError: the options leave no room for copies.
    """

    def __init__(self, storage: Storage, options: ReadOptions) -> None:
        if not options.cache_gb:
            raise ValueError("loader.cache_gb: is 0; loader.access: sequential needs room for the shards of the root")
        self._storage, self._limit = storage, int(options.cache_gb * 1e9)
        self._folder = options.cache_folder / "shards"

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
        if shard.size > self._limit:
            size = f"{shard.size / 1e9:.1f} GB, more than loader.cache_gb ({self._limit / 1e9:g})"
            raise ValueError(f"{self.describe(shard.name)}: has {size}; raise it, or use loader.access: ranges")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked(f"lock-{shard.digest[:2]}"):
                if not self._touch(path):
                    self._make_room(shard.size)
                    with open(self._folder / f"{shard.digest}.part", "wb") as file:
                        self._copy(shard, file)
                    os.rename(file.name, path)
        except OSError as error:
            if error.strerror is None:  # of the other storage, with a complete message
                raise
            raise OSError(
                f"loader.cache: {self._folder}: {error.strerror}; free space, or name another folder"
            ) from None

    def _touch(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Exclude other threads and processes; the system releases the lock if this process ends."""
        with open(self._folder / name, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _copy(self, shard: ShardRef, file: BinaryIO) -> None:
        digest = hashlib.sha256()
        for piece in self._storage.read_in_order(shard, 0, shard.size):
            digest.update(piece)
            file.write(piece)
        if digest.hexdigest() != shard.digest:
            raise ValueError(
                f"{self.describe(shard.name)}: damaged (its sha256 is not the one in the index); restore it"
            )

    def _make_room(self, size: int) -> None:
        """Delete the copies that were not used for longest, until another one of ``size`` bytes fits."""
        with self._locked("lock"):
            found = []
            for entry in os.scandir(self._folder):
                if not entry.name.startswith("lock"):
                    with contextlib.suppress(FileNotFoundError):
                        found.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
            total = sum(held for _, held, _ in found)
            for _, held, path in sorted(found):
                if total + size <= self._limit:
                    return
                if not path.endswith(".part"):
                    Path(path).unlink(missing_ok=True)
                    total -= held
