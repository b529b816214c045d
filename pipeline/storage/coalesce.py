"""Merge nearby ranges of a file into one request, so that its cost is paid once, and slice the ranges out again.

GAP is above the point where both ways cost the reader the same: the fixed cost of a request against bytes that nobody
needs (``benchmarks/loading/remote.py``, docs/performance.md). Servers charge for requests, or limit them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

GAP = 64 << 10  #: unneeded bytes that are read to save a request
LARGEST = 1 << 20  #: bytes of a request of several ranges, so that long reads use several connections


@dataclass(slots=True)
class RangeRequest:
    """Bytes ``offset`` to ``offset + size`` of a file."""

    offset: int
    size: int


def coalesce(ranges: Sequence[tuple[int, int]]) -> list[RangeRequest]:
    """Return ascending requests such that each range (offset, size) lies within one of them."""
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
    """Return the bytes of each range as views of ``data``, the responses to the requests of :func:`coalesce`."""
    starts = [request.offset for request in requests]
    found = []
    for offset, size in ranges:
        number = bisect_right(starts, offset) - 1
        while offset + size > starts[number] + requests[number].size:  # requests may overlap: an earlier one has it
            number -= 1
        begin = offset - starts[number]
        found.append(memoryview(data[number])[begin : begin + size])
    return found
