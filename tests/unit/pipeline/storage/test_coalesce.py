"""Coalescing against the file itself."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.storage.coalesce import GAP, LARGEST, coalesce, slice_ranges

FILE = random.Random(0).randbytes(4 * LARGEST)
offsets = st.integers(0, len(FILE) - 1)
sizes = st.one_of(st.integers(1, 40_000), st.integers(1, 2 * LARGEST))
ranges_of_file = st.lists(st.tuples(offsets, sizes).map(lambda r: (r[0], min(r[1], len(FILE) - r[0]))), max_size=40)


@given(ranges_of_file)
def test_each_range_comes_back_whole_and_little_else_is_read(ranges):
    requests = coalesce(ranges)
    data = [FILE[request.offset : request.offset + request.size] for request in requests]
    assert [bytes(part) for part in slice_ranges(ranges, requests, data)] == [FILE[o : o + s] for o, s in ranges]
    wanted = sorted(set(ranges))
    assert len(requests) <= len(wanted)
    assert sum(request.size for request in requests) <= sum(size for _, size in wanted) + GAP * len(wanted)
    longest = max([LARGEST, *(size for _, size in wanted)])
    assert all(request.size <= longest for request in requests)


def test_near_ranges_share_a_request_and_far_ones_do_not():
    near = [(at, 18_000) for at in range(0, 180_000, 18_000 + GAP)]
    far = [(at, 18_000) for at in range(0, 1_000_000, 18_001 + GAP)]
    assert [(r.offset, r.size) for r in coalesce(near[::-1])] == [(0, near[-1][0] + 18_000)]
    assert [(r.offset, r.size) for r in coalesce(far)] == far
    every = [(at, 18_000) for at in range(0, 3_600_000, 18_000)]
    assert sum(r.size for r in coalesce(every)) == 3_600_000 and len(coalesce(every)) == 4
