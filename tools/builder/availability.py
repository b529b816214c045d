"""Check whether media files exist: each file is checked once, and remote files by several threads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, TypeAlias

from tqdm import tqdm

from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.tools.builder.unique_ids import UniqueIds
from framestream.tools.fetch.base import UNKNOWN, FetchError, MediaSource
from framestream.tools.fetch.host_health import HostCircuitBreaker
from framestream.tools.fetch.root_map import ResolvedLocation

THREADS = 16  #: concurrent requests
_REASONS = tuple(REASONS)

#: A location, the path of a file there, and whether the path is a folder of frames.
FileQuery: TypeAlias = tuple[ResolvedLocation, str, bool]


class Availability(NamedTuple):
    """What is known about a file."""

    size: int  #: bytes, or UNKNOWN
    is_new: bool  #: whether this was the first query for the file
    reason: str  #: why the file is not available, as in the ledger; empty if it is
    message: str  #: the error in one line; empty if the file is available


class AvailabilityChecker:
    """Check files at their locations, and remember the results. A context manager."""

    def __init__(self) -> None:
        self._files = UniqueIds()
        self._results = array("q")  # by file id: its size, or UNKNOWN - 1 - index of the reason
        self._hosts = HostCircuitBreaker()
        self._sources: dict[str, MediaSource] = {}
        self._threads = DaemonThreadPool(THREADS)

    def __enter__(self) -> AvailabilityChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.__exit__(kind, error, trace)

    def check(self, queries: Sequence[FileQuery]) -> list[Availability]:
        """Return the availability of each file, in the order of ``queries``."""
        names = [f"{location.path or location.origin}/{path}\0{tree}" for location, path, tree in queries]
        ids, first = (column.tolist() for column in self._files.assign(names))
        new_results = iter(self._check_new([query for query, is_new in zip(queries, first, strict=True) if is_new]))
        checked = []
        for (location, path, _), number, is_new in zip(queries, ids, first, strict=True):
            message = _describe(location, path)
            if is_new:
                result = next(new_results)
                if isinstance(result, FetchError):
                    message = str(result)
                    result = UNKNOWN - 1 - _REASONS.index(result.reason)
                self._results.append(result)
            stored = self._results[number]
            reason = "" if stored >= UNKNOWN else _REASONS[UNKNOWN - 1 - stored]
            checked.append(Availability(max(stored, UNKNOWN), is_new, reason, message if reason else ""))
        return checked

    def _check_new(self, queries: Sequence[FileQuery]) -> list[int | FetchError]:
        """Check files that were never checked before: local ones here, remote ones in threads."""
        results: list[int | FetchError] = [UNKNOWN] * len(queries)
        # The first file of each source is checked before its others, because many sources list their files then.
        opening: list[int] = []
        others: list[int] = []
        opened: set[str] = set()
        for number, (location, _, _) in enumerate(queries):
            if location.path or not location.resolved:
                results[number] = self._check_file(queries[number])
            elif location.origin in self._sources or location.origin in opened:
                others.append(number)
            else:
                opened.add(location.origin)
                opening.append(number)
        with tqdm(total=len(opening) + len(others), desc="check", unit=" files", disable=None, leave=False) as bar:
            for group in (opening, others):
                group_results = self._threads.map(self._check_file, [queries[number] for number in group])
                for number, result in zip(group, group_results, strict=True):
                    results[number] = result
                    bar.update()
        return results

    def _check_file(self, query: FileQuery) -> int | FetchError:
        location, path, tree = query
        name = _describe(location, path)
        try:
            if not location.resolved:
                raise FetchError("unresolved", name, location.missing)
            size = self._hosts.call(location.origin, lambda: self._source(location).find(path, tree))
        except FetchError as error:
            return error
        return FetchError("missing_file", name, REASONS["missing_file"]) if size is None else size

    def _source(self, location: ResolvedLocation) -> MediaSource:
        name = str(location.path or location.origin)
        if name not in self._sources:
            self._sources[name] = location.open()
        return self._sources[name]


def _describe(location: ResolvedLocation, path: str) -> str:
    return f"{location.path}/{path}" if location.path else f"{location.origin} {path}"
