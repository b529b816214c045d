"""Sampling strategies: the published rule, checked as list slices."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.config.data import EntryConfig, MixEntryConfig
from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.config.subset import select_subset


@given(
    name=st.sampled_from(["first", "first2", "first3", "first4", "end"]),
    number=st.integers(0, 130),
    percent=st.booleans(),
    n=st.integers(0, 120),
)
def test_select_is_a_slice_of_the_list(name, number, percent, n):
    """The published rule written as list slices."""
    number = min(number, 100) if percent else number
    items = list(range(n))
    count = math.ceil(number * n / 100) if percent else number
    part = {"first": 1, "first2": 2, "first3": 3, "first4": 4}.get(name)
    expected = items[(part - 1) * count : part * count] if part else (items[-count:] if count else [])
    assert list(select_subset(f"{name}:{number}{'%' if percent else ''}", n)) == expected


@given(number=st.integers(0, 130), percent=st.booleans(), n=st.integers(0, 120), seed=st.integers(0, 5))
def test_random_takes_different_positions_in_order_and_repeats_itself(number, percent, n, seed):
    number = min(number, 100) if percent else number
    strategy = f"random:{number}{'%' if percent else ''}"
    taken = list(select_subset(strategy, n, seed))
    assert taken == sorted(set(taken)) and set(taken) <= set(range(n))
    assert len(taken) == min(math.ceil(number * n / 100) if percent else number, n)
    assert taken == list(select_subset(strategy, n, seed))


def test_random_depends_on_the_seed():
    assert len({tuple(select_subset("random:10", 1000, seed)) for seed in range(5)}) == 5


def test_all():
    assert list(select_subset("all", 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "strategy",
    [
        "",
        "frist:3",
        "first",
        "first:",
        "first:-1",
        "first:1.5%",
        "first:101%",
        "end:" + "9" * 5000,
        "first5:3",
        "all:3",
    ],
)
def test_unknown_strategy(strategy):
    with pytest.raises(ManifestError, match="sampling"):
        select_subset(strategy, 10)
    with pytest.raises(ManifestError, match="sampling"):
        EntryConfig(annotation="a.json", sampling=strategy)
    with pytest.raises(ManifestError, match="sampling"):
        MixEntryConfig(entry="a", sampling=strategy)
