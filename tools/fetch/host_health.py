"""Circuit breaker for remote hosts: stop asking a host after repeated failures. Also open each source only once."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.fetch.base import FetchError, MediaSource
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.registry import Location, open_source

MAX_FAILURES = 8  #: consecutive failures after which a host is not asked for further files
HOST_REASONS = ("unreachable", "timeout")  #: reasons that concern the host, not the file
LOCATION_REASON = "denied"  #: the reason that concerns the repository, bucket or folder

T = TypeVar("T")


class HostCircuitBreaker:
    """Calls to remote hosts, which fail at once after repeated failures. Threads may share one."""

    def __init__(self) -> None:
        self._failed: dict[str, tuple[FetchError, int]] = {}  # by host or origin: first consecutive error, and count
        self._lock = threading.Lock()  # guards the read-and-increment of counts

    def call(self, origin: str, function: Callable[[], T], max_failures: int = MAX_FAILURES) -> T:
        """Return what ``function`` returns, which reads from ``origin``.

        Args:
            origin: in the syntax of the root map.
            max_failures: consecutive failures after which the host is not asked.

        Raises:
            FetchError: the first of the consecutive failures of the host or location.
        """
        host = host_of(origin)
        for name in (host, origin):
            if (failed := self._failed.get(name)) and failed[1] >= max_failures:
                raise failed[0].with_traceback(None)  # the traceback would grow with every raise
        try:
            result = function()
        except FetchError as error:
            if error.reason in HOST_REASONS or error.reason == LOCATION_REASON:
                name = origin if error.reason == LOCATION_REASON else host
                with self._lock:
                    first, count = self._failed.get(name, (error, 0))
                    self._failed[name] = first, count + 1
                raise first.with_traceback(None) from None
            raise
        with self._lock:
            self._failed.pop(host, None)
            self._failed.pop(origin, None)
        return result


def host_of(origin: str) -> str:
    """Return what must be up to read ``origin``: ``hf:`` for the hub, or scheme and name of a web server or bucket."""
    match = re.match(r"(?:url:|page:)?(hf:|\w+://[^/]+)", origin)
    return match[1] if match else origin


class SourcePool:
    """The sources of locations, each opened once. Threads may share one."""

    def __init__(self, limits: FetchLimits) -> None:
        self.limits = limits
        self.hosts = HostCircuitBreaker()
        self._sources: dict[str, Future[MediaSource]] = {}
        self._lock = threading.Lock()  # guards _sources; sources are opened outside it, and other threads wait for each

    def source(self, location: Location, limits: FetchLimits | None = None) -> MediaSource:
        """Return the source of ``location``, under ``limits`` instead of the default ones if they are given.

        Raises:
            FetchError: the source cannot be read, or its host failed before.
            ValueError: the location is invalid.
        """
        limits = limits or self.limits
        key = f"{canonical_json(location)} {limits}"
        with self._lock:
            source = self._sources.get(key)
            is_opener = source is None
            if source is None:
                source = self._sources[key] = Future()
        if is_opener:
            try:
                source.set_result(self._open(location, limits))
            except Exception as error:  # of any type: other threads wait for the result
                source.set_exception(error)
        return source.result()

    def _open(self, location: Location, limits: FetchLimits) -> MediaSource:
        origin = location if isinstance(location, str) else canonical_json(location)
        return self.hosts.call(origin, lambda: open_source(location, limits), max_failures=1)
