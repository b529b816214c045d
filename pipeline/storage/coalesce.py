"""Ranges of a file to requests: near ones in one, so that a request's cost is paid once, none much larger than needed.

GAP is where both ways cost the same (``benchmarks/loading/remote.py``, docs/performance.md): what a request costs beyond its
bytes against bytes that nobody asked for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

GAP = 64 << 10  #: bytes that are read for nothing to save a request
LARGEST = 1 << 20  #: bytes of a request of several ranges, so that long reads come over several connections


@dataclass(slots=True)
class RangeRequest:
    """Bytes ``offset`` to ``offset + size`` of a file."""

    offset: int
    size: int


def coalesce(ranges: Sequence[tuple[int, int]]) -> list[RangeRequest]:
    """Requests, ascending, such that each range (offset, size) lies whole in one."""
    requests: list[RangeRequest] = []
    for offset, size in sorted(set(ranges)):
        last = requests[-1] if requests else None
        if last is not None:
            end = max(last.offset + last.size, offset + size)
            if offset - (last.offset + last.size) <= GAP and end - last.offset <= max(LARGEST, last.size):
                last.size = end - last.offset
                continue
        requests.append(RangeRequest(offset, size))
    return requests


def slice_ranges(
    ranges: Sequence[tuple[int, int]], requests: Sequence[RangeRequest], data: Sequence[bytes | memoryview]
) -> list[memoryview]:
    """The bytes of each range out of those of :func:`coalesce`'s requests; views, not copies."""
    starts = [request.offset for request in requests]
    found = []
    for offset, size in ranges:
        place = bisect_right(starts, offset) - 1
        while offset + size > starts[place] + requests[place].size:  # of overlapping requests an earlier one holds it
            place -= 1
        at = offset - starts[place]
        found.append(memoryview(data[place])[at : at + size])
    return found
