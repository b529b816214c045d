"""Reads of several ranges of one file, requested when they are made and waited for when they are needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait

from framestream.pipeline.storage.base import ReadOptions
from framestream.pipeline.storage.coalesce import RangeRequest
from framestream.pipeline.storage.connections import Deadline
from framestream.pipeline.storage.http import Address, RangeClient, RangeResponse, TransientReadError
from framestream.pipeline.storage.sent_range import RangeSender, SentRange
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool

THREADS = 64  #: requests that threads of their own make and wait for: first ones, large ones, and other tries
SENT = 128  #: requests at once over open connections, which the threads that read receive
SMALL = 128 << 10  #: bytes of a request that the reading thread receives itself; larger ones arrive in parallel
EARLY_REQUESTS = 48  #: requests of reads that nobody waits for
EARLY_BYTES = 16 << 20  #: bytes of them
EARLY_SECONDS = 10.0  #: after which one makes room for others


class SharedClient:
    """The connections, threads and early reads of one process, for all roots."""

    def __init__(self) -> None:
        self.client, self.threads = RangeClient(), DaemonThreadPool(THREADS)
        self.sender, self.early = RangeSender(self.client, SENT), EarlyReads()


class RangeRead:
    """Parts of one file, requested by the constructor. :meth:`result` or :meth:`close` has to be called once."""

    def __init__(
        self, shared: SharedClient, address: Address, requests: Sequence[RangeRequest], options: ReadOptions
    ) -> None:
        self._shared, self._address, self._requests = shared, address, requests
        self._deadline, self._retries = Deadline(options.timeout), options.retries
        self._sent: dict[int, SentRange] = {}
        self._futures: dict[int, Future[RangeResponse]] = {}
        for number, request in enumerate(requests):
            sent = None
            if request.size <= SMALL:
                sent = shared.sender.send(address, request.offset, request.size, self._deadline)
            if sent:
                self._sent[number] = sent
            else:
                self._fetch(number)

    def result(self) -> list[RangeResponse]:
        """Return the parts, all within one time limit from now.

        Raises:
            OSError, ValueError: as :meth:`RangeClient.fetch`.
        """
        self._deadline.restart()
        found: dict[int, RangeResponse] = {}
        try:
            while self._sent:
                number = next(iter(self._sent))
                failure = None
                try:
                    response = self._sent.pop(number).receive(self._deadline)
                except TransientReadError as error:
                    response, failure = None, error
                if response is None:
                    self._fetch(number, failure)
                else:
                    found[number] = response
            done, pending = wait(self._futures.values(), max(self._deadline.remaining, 0), FIRST_EXCEPTION)
            for future in done:
                if fault := future.exception():
                    raise fault
            if pending:
                raise TimeoutError(f"{self._address.display_url}: {self._deadline.timeout_message()}")
            found |= {number: future.result() for number, future in self._futures.items()}
            return [found[number] for number in range(len(self._requests))]
        finally:
            self.close()

    def close(self) -> None:
        """End the requests that are still under way."""
        for future in self._futures.values():
            future.cancel()
        self._deadline.cancel()
        while self._sent:
            self._sent.popitem()[1].close()

    def _fetch(self, number: int, failure: TransientReadError | None = None) -> None:
        """Let a thread make a request, after the first try that ended with ``failure``."""
        client, address, deadline, retries = self._shared.client, self._address, self._deadline, self._retries

        def fetch(request: RangeRequest) -> RangeResponse:
            return client.fetch(address, request.offset, request.size, deadline, retries, failure)

        self._futures[number] = self._shared.threads.submit(fetch, self._requests[number])


class _EarlyRead:
    """A read with its numbers of requests and bytes; ``lock`` is held while it is started."""

    def __init__(self, requests: int, size: int) -> None:
        self.requests, self.size, self.since = requests, size, time.monotonic()
        self.lock = threading.Lock()
        self.read: RangeRead | None = None


class EarlyReads:
    """Reads that were requested before their readers came for them; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reads: list[tuple[Hashable, _EarlyRead]] = []  # at most EARLY_REQUESTS; a key may come several times

    def add(self, key: Hashable, requests: Sequence[RangeRequest], start: Callable[[], RangeRead]) -> bool:
        """Start a read unless too much is under way already, and return whether it is.

        Reads for which nobody came within ``EARLY_SECONDS`` make room.
        """
        early = _EarlyRead(len(requests), sum(request.size for request in requests))
        with self._lock:
            left = [] if self._has_room(early) else self._pop_old()
            if is_free := self._has_room(early):
                self._reads.append((key, early))
                early.lock.acquire()
        for read in left:
            with read.lock:
                if read.read:
                    read.read.close()
        if is_free:
            try:
                early.read = start()
            finally:
                early.lock.release()
        return is_free

    def take(self, key: Hashable) -> RangeRead | None:
        """Return the read that was started under ``key``, for one reader."""
        with self._lock:
            number = next((number for number, (name, _) in enumerate(self._reads) if name == key), None)
            if number is None:
                return None
            early = self._reads.pop(number)[1]
        with early.lock:
            return early.read

    def _has_room(self, early: _EarlyRead) -> bool:
        """Return whether another read may be under way; a single one always may. The caller holds the lock."""
        requests = early.requests + sum(read.requests for _, read in self._reads)
        size = early.size + sum(read.size for _, read in self._reads)
        return not self._reads or (requests <= EARLY_REQUESTS and size <= EARLY_BYTES)

    def _pop_old(self) -> list[_EarlyRead]:
        begun = time.monotonic() - EARLY_SECONDS
        old = [early for _, early in self._reads if early.since < begun]
        self._reads = [(key, early) for key, early in self._reads if early.since >= begun]
        return old
