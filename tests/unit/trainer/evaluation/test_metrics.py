"""Right answers, controls and intervals, by arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.trainer.evaluation.metrics import (
    CONTROLS,
    MAX_PARTNERS,
    blind_partners,
    bootstrap_ci,
    is_correct,
    summarize,
)


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (" Red. ", "red", True),
        ("(red)", "Red", True),
        ("reddish", "red", False),
        ("", "red", False),
        ("B", "(B)", True),
        ("(B) a red square", "B", True),
        ("b: the second", "B.", True),
        ("Because it is", "B", False),
        ("A", "B", False),
        ("A man", "a", True),
        ("I'm not sure", "I", False),
        ("(a) (b)", "(a) (b)", True),
    ],
)
def test_what_counts_as_the_answer(reply, answer, right):
    assert is_correct(reply, answer) is right


questions = st.lists(st.tuples(st.sampled_from("fg"), st.sampled_from(["x", "X.", "y", "z"]), st.integers(0, 2)))


@given(questions, st.integers(0, 9))
def test_partners_are_of_the_family_and_answer_otherwise(asked, seed):
    families, answers, shown = ([row[k] for row in asked] for k in range(3))
    partners = blind_partners(families, answers, shown, seed)
    assert partners == blind_partners(families, answers, shown, seed)
    for i, found in enumerate(partners):
        fits = [
            j
            for j in range(len(asked))
            if shown[i]
            and families[j] == families[i]
            and shown[j] >= shown[i]
            and answers[j].lower().rstrip(".") != answers[i].lower().rstrip(".")
        ]
        assert set(found) <= set(fits) and len(set(found)) == len(found) == min(len(fits), MAX_PARTNERS)


def test_intervals_are_those_of_the_normal_distribution():
    values = np.repeat([1.0, 0.0], [300, 700])
    low, high = bootstrap_ci(values, seed=0)
    spread = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - spread, abs=0.004) and high == pytest.approx(0.3 + spread, abs=0.004)


def test_gains_compare_the_answers_of_each_question():
    right = np.array([True] * 60 + [False] * 40)
    row = summarize("f", "generation", right, {"blind": right, "shuffled": ~right}, seed=0)
    assert (row["accuracy"], row["blind"], row["shuffled"], row["questions"]) == (60, 60, 40, 100)
    assert row["gain"] == row["gain_low"] == row["gain_high"] == 0  # the same answers, question by question
    assert row["shuffled_gain"] == 20 and row["shuffled_gain_low"] < 20 < row["shuffled_gain_high"]
    assert {f"{name}_low" for name in CONTROLS} <= row.keys()
