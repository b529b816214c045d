"""Epoch orders: every row once, decided by seed and epoch alone."""

from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.mixture import epoch_order


@given(st.sets(st.integers(0, 10**7), max_size=300), st.integers(0, 2**31), st.integers(0, 1000))
def test_an_epoch_has_every_row_once_and_can_be_repeated(rows, seed, epoch):
    rows = np.array(sorted(rows), dtype=np.int64)
    order = epoch_order(rows, seed, epoch, shuffle=True)
    assert sorted(order.tolist()) == rows.tolist()
    assert epoch_order(rows, seed, epoch, shuffle=True).tolist() == order.tolist()
    assert epoch_order(rows, seed, epoch, shuffle=False).tolist() == rows.tolist()


def test_orders_of_epochs_and_seeds_differ_and_look_random():
    rows = np.arange(10_000)
    orders = [epoch_order(rows, seed, epoch, shuffle=True) for seed in range(3) for epoch in range(3)]
    for i, order in enumerate(orders):
        # Spearman correlation of random orders has standard deviation 1 / sqrt(n - 1) = 0.01.
        assert abs(np.corrcoef(order, rows)[0, 1]) < 0.05
        for other in orders[:i]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 0.05
        first = np.bincount(order[:1000] // 1000, minlength=10)
        assert first.min() > 50 and first.max() < 150


def test_order_is_fixed_for_good():
    # A stored checkpoint must find the same order in every later version: these numbers never change.
    assert epoch_order(np.arange(10), 0, 0, shuffle=True).tolist() == [7, 3, 4, 0, 8, 1, 5, 9, 2, 6]
    assert epoch_order(np.arange(10), 1, 2, shuffle=True).tolist() == [2, 1, 7, 4, 9, 0, 6, 8, 5, 3]


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
    assert epoch_order(np.arange(count), seed, epoch, shuffle=True).tolist() == slow_order(count, seed, epoch)
