"""Places on other machines: opened once, and not asked for each of their files where they do not answer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, TypeVar

from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.fetch.base import FetchError, MediaSource
from framestream.tools.fetch.http.retry import FetchLimits
from framestream.tools.fetch.registry import open_source

MAX_FAILURES = 8  #: failures one after another, after which a host is asked no more for single files
OF_HOST = ("unreachable", "timeout")  #: reasons that speak of the host, not of the file
OF_PLACE = "denied"  #: speaks of the repository, bucket or folder

T = TypeVar("T")


class HostCircuitBreaker:
    """Calls to places on other machines. Threads may share one."""

    def __init__(self) -> None:
        self._failed: dict[str, tuple[FetchError, int]] = {}  # the first of a row of failures, and how many there were
        self._lock = threading.Lock()

    def call(self, origin: str, function: Callable[[], T], patience: int = MAX_FAILURES) -> T:
        """What ``function`` returns, which asks the place ``origin``, worded as in a root map.

        Args:
            patience: failures in a row after which the host is not asked.

        Raises:
            FetchError: it cannot be asked, by the first of the failures of its host or place.
        """
        host = host_of(origin)
        for name in (host, origin):
            error, times = self._failed.get(name, (None, 0))
            if times >= patience:
                raise error.with_traceback(None)  # which would grow with every raise
        try:
            answer = function()
        except FetchError as error:
            if error.reason in OF_HOST or error.reason == OF_PLACE:
                name = origin if error.reason == OF_PLACE else host
                with self._lock:
                    first, times = self._failed.get(name, (error, 0))
                    self._failed[name] = first, times + 1
                raise first.with_traceback(None) from None
            raise
        with self._lock:
            self._failed.pop(host, None)
            self._failed.pop(origin, None)
        return answer


def host_of(origin: str) -> str:
    """What has to be up for ``origin`` to be read: ``hf:`` for the hub, scheme and name of a web server or a bucket."""
    found = re.match(r"(?:url:|page:)?(hf:|\w+://[^/]+)", origin)
    return found[1] if found else origin


class SourcePool:
    """The sources of places, each opened once; threads may share one."""

    def __init__(self, limits: FetchLimits) -> None:
        self.limits = limits
        self.hosts = HostCircuitBreaker()
        self._sources: dict[str, Future[MediaSource]] = {}
        self._lock = threading.Lock()

    def source(self, given: str | Mapping[str, Any], limits: FetchLimits | None = None) -> MediaSource:
        """The source of ``given``, a value of a root map, under ``limits`` in place of the usual ones.

        Raises:
            FetchError: it cannot be asked, or its host did not answer before.
            ValueError: it is no place.
        """
        limits = limits or self.limits
        key = f"{canonical_json(given)} {limits}"
        with self._lock:
            opened = self._sources.get(key)
            waiting = Future() if opened is None else None
            if waiting:
                self._sources[key] = opened = waiting
        if waiting:
            try:
                waiting.set_result(self._open(given, limits))
            except Exception as error:  # whatever it is, other threads wait for it
                waiting.set_exception(error)
        return opened.result()

    def _open(self, given: str | Mapping[str, Any], limits: FetchLimits) -> MediaSource:
        shown = given if isinstance(given, str) else canonical_json(given)
        return self.hosts.call(shown, lambda: open_source(given, limits), patience=1)
