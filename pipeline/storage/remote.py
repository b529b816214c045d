"""Roots on other machines: ranged requests side by side, and a local folder for copies."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path

from framestream.pipeline.storage.addresses import AddressResolver
from framestream.pipeline.storage.base import ReadOptions, ShardRef
from framestream.pipeline.storage.cache import RangeCache
from framestream.pipeline.storage.coalesce import RangeRequest, coalesce, slice_ranges
from framestream.pipeline.storage.connections import Deadline
from framestream.pipeline.storage.http import RangeClient, RangeResponse
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool

REQUESTS = 64  #: requests of a process that run at once
PIECE = 4 << 20  #: bytes of a whole file that one request brings
SIDE_BY_SIDE = 8  #: such requests at once; a line of 5 Mbit/s brings them within the default loader.read_timeout
SMALL = 64 << 20  #: most bytes of a file that is read whole into memory


class SharedClient:
    """Connections and threads of one process, for all roots."""

    def __init__(self) -> None:
        self.client, self.threads = RangeClient(), DaemonThreadPool(REQUESTS)


class RemoteStorage:
    """The files of a web server, a bucket or the hub (see :class:`framestream.pipeline.storage.base.Storage`)."""

    remote = True

    def __init__(self, place: AddressResolver, reading: ReadOptions) -> None:
        self.root = place.shown
        self._place, self._reading = place, reading
        cache = Path(reading.cache).expanduser()
        name = re.sub(r"[^\w.-]+", "-", self.root.partition("://")[2])[-60:].strip("-.")
        self._folder = cache / "roots" / f"{name}-{hashlib.sha256(self.root.encode()).hexdigest()[:16]}"
        self._ranges = RangeCache(cache / "ranges", int(reading.cache_gb * 1e9)) if reading.cache_gb else None

    @property
    def folder(self) -> Path:
        with self._writing():
            self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
        key = f"{shard.digest} {list(ranges)}" if self._ranges and shard.digest else ""
        if key and (kept := self._ranges.get(key)) is not None:
            return _split(kept, ranges)
        requests = coalesce(ranges)
        parts = self._fetch(shard.name, requests)
        for part, request in zip(parts, requests, strict=True):
            if part.total != shard.size:
                there = f"has {part.total:,} of {shard.size:,} bytes"
                raise ValueError(f"{self.describe(shard.name)}: {there}; copy the file there again")
            if len(part.data) < request.size:
                raise ValueError(
                    f"{self.describe(shard.name)}: ends within the {request.size} bytes at {request.offset}"
                )
        found = slice_ranges(ranges, requests, [part.data for part in parts])
        if key:
            self._ranges.put(key, found)
        return found

    def read_all(self, name: str) -> bytes:
        [part] = self._fetch(name, [RangeRequest(0, SMALL)])
        if part.total > SMALL:
            raise ValueError(f"{self.describe(name)}: has {part.total:,} bytes, which is no such file of a root")
        return part.data

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        if not re.fullmatch(r"\w{1,128}", version):  # it comes from the other machine
            raise ValueError(f"{version!r} is no fingerprint")
        folder = self.folder / version
        with self._writing(), _locked(self._folder / "lock"):
            if not folder.is_dir():
                for old in self._folder.iterdir():  # other versions, and what killed processes left
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
        """Parts of one file, all within one time limit."""
        ticket, address, client = Deadline(self._reading.timeout), self._place.address(name), _network.client

        def fetch(request: RangeRequest) -> RangeResponse:
            return client.fetch(address, request.offset, request.size, ticket, self._reading.retries)

        futures = [_network.threads.submit(fetch, request) for request in requests]
        try:
            done, left = wait(futures, max(ticket.left, 0), FIRST_EXCEPTION)
            for future in done:
                if future.exception():
                    raise future.exception()
            if left:
                raise TimeoutError(f"{address.shown}: {ticket.late()}")
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
            ticket.end()

    def _copy(self, name: str, path: Path) -> None:
        """Write the whole file ``name`` to ``path``."""
        [first] = self._fetch(name, [RangeRequest(0, PIECE)])
        with open(path, "wb") as file:
            file.write(first.data)
            step = PIECE * SIDE_BY_SIDE
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
            raise ValueError(f"{self.describe(name)}: {path.stat().st_size:,} of {first.total:,} bytes have come")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Failures of the local folder in one line; those of the network have a line already."""
        try:
            yield
        except OSError as error:
            if error.strerror is None:
                raise
            message = f"loader.cache: {self._reading.cache} cannot be written ({error.strerror}); name another folder"
            raise OSError(message) from None


def _split(data: memoryview, ranges: Sequence[tuple[int, int]]) -> list[memoryview]:
    """The bytes of ranges that lie one after the other."""
    found, at = [], 0
    for _, size in ranges:
        found.append(data[at : at + size])
        at += size
    return found


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Alone among the processes of this machine; the lock ends with its process."""
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _renew() -> None:
    global _network
    _network = SharedClient()


_renew()
os.register_at_fork(after_in_child=_renew)  # threads do not live on in a child, and connections cannot be shared
