"""Whether media are where the root map says: each file is asked for once, other machines by several threads."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple

from tqdm import tqdm

from framestream.pipeline.shards.ledger import REASONS
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.tools.builder.unique_ids import UniqueIds
from framestream.tools.fetch.base import UNKNOWN, FetchError, MediaSource
from framestream.tools.fetch.host_health import HostCircuitBreaker
from framestream.tools.fetch.root_map import ResolvedLocation

THREADS = 16  #: requests under way at once
_REASONS = tuple(REASONS)

Wanted = tuple[ResolvedLocation, str, bool]  #: a place, the path of a file there, and whether it is a folder of frames


class Availability(NamedTuple):
    """What is known of a file."""

    size: int  #: bytes, or UNKNOWN
    new: bool  #: nobody asked for it before
    reason: str  #: why there is none, as in the ledger; empty where there is one
    message: str


class AvailabilityChecker:
    """Asks places for files; a context manager."""

    def __init__(self) -> None:
        self._files = UniqueIds()
        self._answers = array("q")  # by number of the file: its size, or UNKNOWN - 1 - number of the reason
        self._hosts = HostCircuitBreaker()
        self._sources: dict[str, MediaSource] = {}
        self._threads = DaemonThreadPool(THREADS)

    def __enter__(self) -> AvailabilityChecker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.__exit__(kind, error, trace)

    def ask(self, wanted: Sequence[Wanted]) -> list[Availability]:
        """An answer for each file."""
        names = [f"{place.path or place.origin}/{path}\0{tree}" for place, path, tree in wanted]
        numbers, first = (column.tolist() for column in self._files.assign(names))
        fresh = iter(self._ask_new([item for item, new in zip(wanted, first, strict=True) if new]))
        answers = []
        for (place, path, _), number, new in zip(wanted, numbers, first, strict=True):
            message = _shown(place, path)
            if new:
                answer = next(fresh)
                failed = isinstance(answer, FetchError)
                message = str(answer) if failed else message
                self._answers.append(UNKNOWN - 1 - _REASONS.index(answer.reason) if failed else answer)
            known = self._answers[number]
            reason = "" if known >= UNKNOWN else _REASONS[UNKNOWN - 1 - known]
            answers.append(Availability(max(known, UNKNOWN), new, reason, message if reason else ""))
        return answers

    def _ask_new(self, wanted: Sequence[Wanted]) -> list[int | FetchError]:
        answers: list[int | FetchError] = [UNKNOWN] * len(wanted)
        opening, others, ahead = [], [], set()  # the first file of a place goes ahead: many places list theirs then
        for number, (place, _, _) in enumerate(wanted):
            if place.path or not place.resolved:
                answers[number] = self._ask(wanted[number])
            elif place.origin in self._sources or place.origin in ahead:
                others.append(number)
            else:
                ahead.add(place.origin)
                opening.append(number)
        with tqdm(total=len(opening) + len(others), desc="look", unit=" files", disable=None, leave=False) as bar:
            for group in (opening, others):
                found = self._threads.map(self._ask, [wanted[number] for number in group])
                for number, answer in zip(group, found, strict=True):
                    answers[number] = answer
                    bar.update()
        return answers

    def _ask(self, wanted: Wanted) -> int | FetchError:
        place, path, tree = wanted
        name = _shown(place, path)
        try:
            if not place.resolved:
                raise FetchError("unresolved", name, place.missing)
            size = self._hosts.call(place.origin, lambda: self._source(place).find(path, tree))
        except FetchError as error:
            return error
        return FetchError("missing_file", name, REASONS["missing_file"]) if size is None else size

    def _source(self, place: ResolvedLocation) -> MediaSource:
        at = str(place.path or place.origin)
        if at not in self._sources:
            self._sources[at] = place.open()
        return self._sources[at]


def _shown(place: ResolvedLocation, path: str) -> str:
    return f"{place.path}/{path}" if place.path else f"{place.origin} {path}"
