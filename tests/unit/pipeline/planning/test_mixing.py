"""Epoch orders: every row once, decided only by seed and epoch."""

from __future__ import annotations

import hashlib
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.config.loading import ORDERS, BatchingConfig
from framestream.pipeline.planning.mixing import apportion, epoch_order, epoch_seed, permute


def ordered(rows: np.ndarray, seed: int, epoch: int, order: str = "shuffle", size: int = 4) -> np.ndarray:
    """An epoch's order of dialogues of which every third is text; lengths are spread by a prime."""
    lengths = (1 + rows * 7919 % 1009) * np.where(rows % 3, 1, -1)
    return epoch_order(rows, lengths, BatchingConfig(global_batch=size, row_multiple=2, order=order), seed, epoch)


@given(
    st.sets(st.integers(0, 10**7), min_size=1, max_size=300),
    st.integers(0, 2**31),
    st.integers(0, 1000),
    st.sampled_from(ORDERS),
    st.integers(1, 40),
)
def test_an_epoch_has_every_row_once_and_can_be_repeated(rows, seed, epoch, order, size):
    rows = np.array(sorted(rows), dtype=np.int64)
    state = torch.get_rng_state()
    got = ordered(rows, seed, epoch, order, size)
    assert got.dtype == np.int64 and len(set(got.tolist())) == len(got)
    if order == "modality_length":
        kinds = [int((rows % 3 > 0).sum()), int((rows % 3 == 0).sum())]
        kept = sum((-(-count // size) - 1) * size for count in kinds)  # the last batch of each kind is dropped
        assert len(got) == (kept if all(kinds) else len(rows)) and set(got.tolist()) <= set(rows.tolist())
    else:
        assert sorted(got.tolist()) == rows.tolist()
    assert ordered(rows, seed, epoch, order, size).tolist() == got.tolist()
    assert torch.equal(torch.get_rng_state(), state), "torch's global generator was used"


def test_sequential_is_the_order_of_the_index():
    rows = np.array([3, 5, 6, 10])
    assert ordered(rows, 1, 2, "sequential").tolist() == rows.tolist()


@pytest.mark.parametrize("order", [order for order in ORDERS if order != "sequential"])
def test_orders_of_epochs_and_seeds_differ_and_look_random(order):
    rows = np.arange(10_000)
    orders = [ordered(rows, seed, epoch, order) for seed in range(3) for epoch in range(3)]
    for i, one in enumerate(orders):
        # Spearman correlation of random orders has standard deviation 1 / sqrt(n - 1) = 0.01, 0.02 for batches of 4.
        assert abs(np.corrcoef(one, np.arange(len(one)))[0, 1]) < 0.1
        for other in orders[:i]:
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.1
        first = np.bincount(one[:1000] // 1000, minlength=10)
        assert first.min() > 50 and first.max() < 150


def test_order_is_fixed_for_good():
    # A stored checkpoint must find the same order in every later version: these numbers never change.
    assert ordered(np.arange(10), 0, 0).tolist() == [7, 3, 4, 0, 8, 1, 5, 9, 2, 6]
    assert ordered(np.arange(10), 1, 2).tolist() == [2, 1, 7, 4, 9, 0, 6, 8, 5, 3]
    for order, wanted in {
        "modality": [9, 6, 3, 12, 8, 11, 10, 4, 1, 13, 2, 5, 0, 7],
        "modality_length": [9, 0, 3, 12, 1, 8, 11, 10, 7, 13, 2, 5],
        "length": [9, 0, 4, 13, 1, 12, 3, 10, 11, 5, 7, 6, 8, 2],
        "long_together": [1, 6, 8, 2, 7, 12, 3, 10, 9, 0, 4, 13, 11, 5],
        "length_windows": [12, 11, 4, 0, 10, 2, 6, 1, 3, 8, 9, 5, 13, 7],
    }.items():
        assert ordered(np.arange(14), 1, 2, order).tolist() == wanted, order


def slow_order(count: int, seed: int, epoch: int) -> list[int]:
    """The definition once more, in Python integers."""
    start = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")

    def mixed(value: int) -> int:
        value = value * 0x9E3779B97F4A7C15 % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    return sorted(range(count), key=lambda row: mixed((row + start) % 2**64))


@given(st.integers(0, 60), st.integers(0, 2**40), st.integers(0, 50))
def test_order_equals_its_definition_in_plain_integers(count, seed, epoch):
    assert ordered(np.arange(count), seed, epoch).tolist() == slow_order(count, seed, epoch)


def test_orders_sorted_by_parts_equal_the_definition():
    rows = np.arange(3 << 18, dtype=np.int32)  # three parts
    wanted = rows.astype(np.uint64) + np.uint64(epoch_seed(1, 2))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        wanted = wanted * np.uint64(0x9E3779B97F4A7C15) if shift == 30 else wanted
        wanted = (wanted ^ wanted >> np.uint64(shift)) * np.uint64(factor)
    wanted ^= wanted >> np.uint64(31)
    got = permute(rows, epoch_seed(1, 2))
    assert got.dtype == np.int32 and np.array_equal(got, np.argsort(wanted))


weights_and_limits = st.tuples(st.fractions(0, 9, max_denominator=20), st.integers(0, 300) | st.none())


@given(st.integers(0, 1000), st.lists(weights_and_limits, min_size=1, max_size=6))
def test_whole_parts_add_up_and_keep_to_weights_and_limits(total, parts):
    weights, limits = ([part[i] for part in parts] for i in (0, 1))
    room = sum(total if limit is None else limit for weight, limit in parts if weight)
    if room < total:
        with pytest.raises(ValueError, match=f"{total} requested, {room} available"):
            apportion(total, weights, limits)
        return
    got = apportion(total, weights, limits)
    assert sum(got) == total and all(count >= 0 for count in got)
    free = []
    for count, weight, limit in zip(got, weights, limits, strict=True):
        assert limit is None or count <= limit
        assert weight or not count
        if weight and (limit is None or count < limit):
            free.append((count, weight))
    for count, weight in free:  # within one of what the scale of any other gives
        assert all(abs(count - Fraction(c) / w * weight) < 1 + weight / w for c, w in free)
