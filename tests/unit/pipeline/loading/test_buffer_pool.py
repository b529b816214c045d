"""Buffers are reused when nothing refers to them any more, and never before."""

from __future__ import annotations

import gc
import mmap
import os
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.loading import buffer_pool as buffers
from framestream.pipeline.loading.buffer_pool import MIN_BUFFER_BYTES, BufferPool

#: What a consumer may keep of an array. Each refers to the same memory in another way.
HOLDS = {
    "array": lambda array: array,
    "view of a view": lambda array: array[: len(array) // 2].reshape(2, -1)[1],
    "tensor": torch.from_numpy,
    "part of a tensor": lambda array: torch.from_numpy(array.reshape(-1, 4))[3:, 1],
    "array of a tensor": lambda array: torch.from_numpy(array).numpy()[5:],
    "storage": lambda array: torch.from_numpy(array).untyped_storage(),
    "memoryview": lambda array: memoryview(array[8:]),
    "dlpack": lambda array: np.from_dlpack(torch.from_numpy(array)),
    "iterator": lambda array: iter(array[1:]),
}


def content(reference) -> set[int]:
    if isinstance(reference, torch.UntypedStorage):
        reference = torch.empty(0, dtype=torch.uint8).set_(reference)
    return set(np.unique(np.asarray(reference)).tolist())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("how", HOLDS)
def test_whatever_still_refers_to_a_buffer_keeps_it(how, shared):
    pool = BufferPool(8 * MIN_BUFFER_BYTES, shared)
    array, first = pool.acquire(4096)
    array[:] = 7
    reference = HOLDS[how](array)
    del array
    gc.collect()
    pool.release(first)
    for _ in range(3):
        other, second = pool.acquire(4096)
        assert second is not first
        other[:] = 9
    assert [int(value) for value in reference][:3] == [7] * 3 if how == "iterator" else content(reference) == {7}
    del reference, other
    gc.collect()
    assert pool.in_use == 0
    assert first.number in pool.numbers
    count = len(pool.numbers)
    taken = [pool.acquire(4096) for _ in range(count)]  # all are used again, and no other
    assert {buffer.number for _, buffer in taken} == pool.numbers and len(pool.numbers) == count


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    shared=st.booleans(),
    bound=st.integers(1, 6),
    steps=st.lists(st.sampled_from(["acquire", "acquire", "release", "drop", "discard"]), min_size=10, max_size=60),
)
def test_no_content_is_ever_lost_and_the_bound_holds(seed, shared, bound, steps):
    rng, pool = random.Random(seed), BufferPool(bound * MIN_BUFFER_BYTES, shared)
    ahead, handed, stamp = [], [], 0
    largest = 0
    for step in steps:
        if step == "acquire":
            unit = MIN_BUFFER_BYTES
            size = rng.choice([0, 1, 1000, unit, unit + 1, 3 * unit, rng.randrange(5 * unit)])
            lent = pool.acquire(size)
            assert lent is not None or ahead, "with nothing ahead there is always room"
            if lent:
                array, buffer = lent
                assert array.shape == (size,) and array.dtype == np.uint8
                stamp = stamp % 250 + 1
                array[:] = stamp
                ahead.append((rng.choice([torch.from_numpy, np.asarray])(array), buffer, stamp))
                largest = max(largest, len(buffer.memory))
                del array, lent, buffer
        elif step == "release" and ahead:
            handed.append(ahead.pop(0))
            pool.release(handed[-1][1])
        elif step == "drop" and handed:
            del handed[rng.randrange(len(handed))]
        elif step == "discard" and ahead:
            pool.discard(ahead[0][1])
            handed.append(ahead.pop(0))
        released = sum(len(buffer.memory) for _, buffer, _ in handed if buffer.number in pool.numbers)
        assert pool.nbytes - released <= max(bound * MIN_BUFFER_BYTES, largest) + 2 * largest
    for reference, _, value in (*ahead, *handed):
        assert not len(reference) or content(reference) == {value}


def test_a_discarded_buffer_is_not_reused():
    pool = BufferPool(4 * MIN_BUFFER_BYTES, True)
    array, bad = pool.acquire(10)
    pool.discard(bad)
    del array
    gc.collect()
    assert pool.acquire(10)[1].number != bad.number and bad.number not in pool.numbers


def test_another_mapping_of_a_shared_buffer_sees_its_pixels():
    array, buffer = BufferPool(MIN_BUFFER_BYTES, True).acquire(100)
    array[:] = 3
    with mmap.mmap(buffer.descriptor, 0) as other:
        assert other[:100] == bytes([3]) * 100
        other[:2] = b"ab"
    assert array[:2].tobytes() == b"ab"


def test_few_files_are_open_and_none_after(monkeypatch):
    monkeypatch.setattr(buffers, "MAX_FREE_BUFFERS", 5)
    before = len(os.listdir("/proc/self/fd"))
    pool = BufferPool(100 * MIN_BUFFER_BYTES, True)
    arrays = [pool.acquire(10) for _ in range(20)]
    del arrays
    gc.collect()
    assert pool.in_use == 0 and len(pool.numbers) == 5
    reference = pool.acquire(10)[0]
    del pool
    gc.collect()
    reference[:] = 1  # outlives its pool
    del reference
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before
