"""Read roots on other machines: concurrent ranged requests, and a local folder for copies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from pathlib import Path

from framestream.pipeline.storage.addresses import AddressResolver
from framestream.pipeline.storage.base import ReadOptions, ShardRef
from framestream.pipeline.storage.cache import RangeCache
from framestream.pipeline.storage.coalesce import RangeRequest, coalesce, slice_ranges
from framestream.pipeline.storage.http import RangeResponse
from framestream.pipeline.storage.range_read import RangeRead, SharedClient
from framestream.pipeline.storage.sequential import SequentialRead

PIECE = 4 << 20  #: bytes per request when a complete file is copied
CONCURRENT_PIECES = 8  #: such requests at once; at 5 Mbit/s they arrive within the default loader.read_timeout
MAX_SMALL = 64 << 20  #: bytes up to which a file is read into memory completely


class RemoteStorage:
    """The files of a web server, a bucket or the hub (see :class:`framestream.pipeline.storage.base.Storage`)."""

    remote = True

    def __init__(self, resolver: AddressResolver, options: ReadOptions) -> None:
        self.root = resolver.display_url
        self._resolver, self._options = resolver, options
        self._folder = options.root_folder(self.root)
        ranges = options.cache_folder / "ranges"
        self._range_cache = RangeCache(ranges, options.cache_bytes) if options.cache_gb else None

    @property
    def derived_folders(self) -> list[Path]:
        return [self._folder]

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        cache = self._range_cache if shard.digest else None
        key = f"{shard.digest} {list(ranges)}" if cache else ""
        if cache and (cached := cache.get(key)) is not None:
            return _split(cached, ranges)
        requests = coalesce(ranges)
        early = _shared.early.take(self._early_key(shard, ranges))
        parts = early.result() if early else self._fetch(shard.name, requests)
        for part, request in zip(parts, requests, strict=True):
            if part.total != shard.size:
                size = f"has {part.total:,} of {shard.size:,} bytes"
                raise ValueError(f"{self.describe(shard.name)}: {size}; copy the file there again")
            if len(part.data) < request.size:
                raise ValueError(
                    f"{self.describe(shard.name)}: ends within the {request.size} bytes at {request.offset}"
                )
        found = slice_ranges(ranges, requests, [part.data for part in parts])
        if cache:
            cache.put(key, found)
        return found

    def prefetch(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> bool:
        if self._range_cache and shard.digest and self._range_cache.has(f"{shard.digest} {list(ranges)}"):
            return True
        requests, shared = coalesce(ranges), _shared

        def start() -> RangeRead:
            return RangeRead(shared, self._resolver.address(shard.name), requests, self._options)

        return shared.early.add(self._early_key(shard, ranges), requests, start)

    def _early_key(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> Hashable:
        return self.root, shard.name, tuple(ranges)

    def read_in_order(self, shard: ShardRef, offset: int, size: int) -> Iterator[bytes]:
        locate, options, span = partial(self._resolver.address, shard.name), self._options, (offset, size)
        yield from SequentialRead(_shared.client, locate, span, shard.size, options.timeout, options.retries)

    def read_all(self, name: str) -> bytes:
        [part] = self._fetch(name, [RangeRequest(0, MAX_SMALL)])
        if part.total > MAX_SMALL:
            raise ValueError(f"{self.describe(name)}: has {part.total:,} bytes, too many for such a file of a root")
        return bytes(part.data)

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        if not re.fullmatch(r"\w{1,128}", version):  # it is read from the other machine and becomes a folder name
            raise ValueError(f"{version!r} is not a fingerprint")
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
        folder = self._folder / version
        with self._writing(), _locked(self._folder / "lock"):
            if not folder.is_dir():
                for old in self._folder.iterdir():  # other versions, and unfinished copies of killed processes
                    if old.is_dir():
                        shutil.rmtree(old)
                temporary = self._folder / f"{version}.tmp"
                for name in names:
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    self._copy(name, temporary / name)
                check([temporary / name for name in names])
                os.rename(temporary, folder)
        return [folder / name for name in names]

    def describe(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _fetch(self, name: str, requests: Sequence[RangeRequest]) -> list[RangeResponse]:
        """Read parts of one file, all within one time limit."""
        return RangeRead(_shared, self._resolver.address(name), requests, self._options).result()

    def _copy(self, name: str, path: Path) -> None:
        """Copy the complete file ``name`` to ``path``."""
        [first] = self._fetch(name, [RangeRequest(0, PIECE)])
        with open(path, "wb") as file:
            file.write(first.data)
            step = PIECE * CONCURRENT_PIECES
            for start in range(PIECE, first.total, step):
                end = min(start + step, first.total)
                requests = [RangeRequest(at, min(PIECE, end - at)) for at in range(start, end, PIECE)]
                for part in self._fetch(name, requests):
                    if (part.identity, part.total) != (first.identity, first.total):
                        raise ValueError(f"{self.describe(name)}: has changed while it was being read; open it again")
                    file.write(part.data)
            file.flush()
            os.fsync(file.fileno())
        if path.stat().st_size != first.total:
            raise ValueError(f"{self.describe(name)}: {path.stat().st_size:,} of {first.total:,} bytes have arrived")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Describe errors of the local folder in one line; those of the network already have one."""
        try:
            yield
        except OSError as error:
            if error.strerror is None:  # raised by this package, with a complete message
                raise
            message = f"loader.cache: {self._options.cache} cannot be written ({error.strerror}); name another folder"
            raise OSError(message) from None


def _split(data: memoryview, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """Split the concatenated bytes of ranges."""
    found, begin = [], 0
    for _, size in ranges:
        found.append(data[begin : begin + size])
        begin += size
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclude the other processes of this machine; the system releases the lock if the process ends."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


_shared = SharedClient()


def _reset() -> None:
    global _shared
    _shared = SharedClient()


os.register_at_fork(after_in_child=_reset)  # a child has none of the threads, and cannot share connections
