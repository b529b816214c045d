"""Packed rows: every dialogue in one row, no row too long, few and balanced rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.loading.lengths import COST, stage3
from framestream.pipeline.config.loading import CostModel
from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.planning.packing import costs, load_balance, pack
from framestream.trainer.model.cost import cost_coefficients
from tests.helpers.paths import ROOT

lengths_of_batches = st.lists(st.integers(1, 100), max_size=60)


@given(lengths_of_batches, st.integers(100, 300), st.integers(1, 8), st.booleans())
def test_rows_hold_every_dialogue_once_and_never_too_much(lengths, limit, multiple, squared):
    lengths = np.array(lengths, dtype=np.int64)
    cost = costs(CostModel(patch=0, token=1, pair=1.0 if squared else 0.0), np.zeros(len(lengths)), lengths)
    rows = pack(lengths, cost, limit, multiple)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= limit for row in rows)
    assert len(rows) % multiple == 0 and rows
    totals = [cost[row].sum() for row in rows]
    assert all(a >= b - 1e-9 * abs(a) for a, b in zip(totals, totals[1:], strict=False))
    assert all((np.diff(row) > 0).all() for row in rows)
    again = pack(lengths, cost, limit, multiple)
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


@given(lengths_of_batches.filter(len), st.integers(1, 8))
def test_one_multiple_of_rows_where_one_is_enough(lengths, multiple):
    lengths = np.array(lengths)
    rows = pack(lengths, costs(None, lengths, lengths), int(lengths.sum()), multiple)
    assert len(rows) == multiple


def exact_rows(lengths: list[int], limit: int) -> int:
    """The least possible number of rows, by trying everything."""
    best = len(lengths)

    def assign(i: int, rows: list[int]) -> None:
        nonlocal best
        if len(rows) >= best and i < len(lengths):
            return
        if i == len(lengths):
            best = min(best, len(rows))
            return
        for r in range(len(rows)):
            if rows[r] + lengths[i] <= limit:
                assign(i + 1, [*rows[:r], rows[r] + lengths[i], *rows[r + 1 :]])
        assign(i + 1, [*rows, lengths[i]])

    assign(0, [])
    return best


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(50, 90))
def test_close_to_the_least_number_of_rows(lengths, limit):
    least = exact_rows(sorted(lengths, reverse=True), limit)
    array = np.array(lengths)
    assert least <= len(pack(array, array.astype(float), limit, 1)) <= least + 1


@given(st.integers(0, 2**32), st.sampled_from([8, 16]))
def test_rows_are_balanced_when_no_dialogue_dominates(seed, count):
    lengths = np.random.default_rng(seed).integers(200, 2000, 256)
    cost = costs(CostModel(patch=0, token=1, pair=1e-4), lengths, lengths)
    totals = np.array([cost[row].sum() for row in pack(lengths, cost, 10**6, count)])
    # Greedy packing never lifts a row above the mean by more than one dialogue (Graham 1969).
    assert totals.max() <= totals.mean() + cost.max()
    assert totals.mean() / totals.max() > 0.95


def test_formula_of_the_cost():
    got = costs(CostModel(patch=3.0, token=5.0, pair=0.5), np.array([10, 0]), np.array([4, 6]))
    assert got.tolist() == [3 * 10 + 5 * 4 + 0.5 * 16, 5 * 6 + 0.5 * 36]
    assert costs(None, np.array([10]), np.array([4])).tolist() == [4.0]


def test_a_dialogue_over_the_limit_is_an_error():
    with pytest.raises(ValueError, match="300 tokens does not fit a row of 200"):
        pack(np.array([300]), np.array([1.0]), 200, 1)


def lost(rows: list[np.ndarray], cost: np.ndarray, ranks: int) -> tuple[float, float]:
    """Sums over micro-steps of the mean and of the largest cost of a rank, row by row."""
    totals = [sum(cost[i] for i in row) for row in rows]
    steps = [totals[start : start + ranks] for start in range(0, len(totals), ranks)]
    return sum(sum(step) / ranks for step in steps), sum(max(step) for step in steps)


@pytest.mark.parametrize(("multiple", "ranks"), [(8, 8), (32, 8), (32, 32), (64, 8), (64, 32)])
def test_ranks_are_balanced_on_the_synthetic_stage_3(multiple, ranks):
    batches, mean, largest = 24, 0.0, 0.0
    lengths = stage3(256 * batches, seed=1)
    cost = costs(COST, lengths.patches, lengths.tokens)
    for batch in range(batches):
        part = slice(256 * batch, 256 * (batch + 1))
        rows = pack(lengths.tokens[part], cost[part], 32_768, multiple)
        sums = lost(rows, cost[part], ranks)
        assert load_balance([cost[part][row] for row in rows], ranks) == pytest.approx(sums[0] / sums[1])
        mean, largest = mean + sums[0], largest + sums[1]
    assert mean / largest >= 0.97


def test_the_synthetic_stage_3_has_the_costs_of_the_published_model():
    made = cost_coefficients(load_manifest(ROOT / "manifests" / "stage3.yaml"))
    assert (COST.patch, COST.token, COST.pair) == pytest.approx((made.patch, made.token, made.pair), rel=1e-3)


def test_one_long_dialogue_costs_its_own_micro_step_alone():
    """The rows beside it are filled up to it, so that two micro-steps of four ranks take 100 + 20 and not 100 + 40."""
    cost = np.array([100.0] + [10.0] * 38)
    lengths = cost.astype(np.int64)
    rows = pack(lengths, cost, 1000, 8)
    assert sorted((float(cost[row].sum()) for row in rows), reverse=True) == [100] * 4 + [20] * 4
    assert load_balance([cost[row] for row in rows], 4) == 1.0


@given(lengths_of_batches.filter(len), st.integers(1, 8))
def test_rows_do_not_depend_on_the_unit_of_cost(lengths, multiple):
    lengths = np.array(lengths)
    rows = [pack(lengths, lengths * unit, 200, multiple) for unit in (1.0, 2.0**40, 2.0**-20)]
    assert [[row.tolist() for row in each] for each in rows[1:]] == [[row.tolist() for row in rows[0]]] * 2


def test_no_cost_at_all_still_makes_rows():
    rows = pack(np.array([3, 4]), np.zeros(2), 10, 2)
    assert sorted(i for row in rows for i in row.tolist()) == [0, 1] and load_balance([np.zeros(0)] * 2, 2) == 1.0
