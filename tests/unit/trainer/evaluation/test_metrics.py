"""Right answers, controls and intervals, by arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.evaluation.questions import MediaContents
from framestream.trainer.evaluation.metrics import (
    CONTROLS,
    MAX_PARTNERS,
    blind_partners,
    bootstrap_ci,
    is_correct,
    summarize,
)
from framestream.trainer.evaluation.run_files import BLIND_FIELDS

#: what replies count as the letter A, and what do not
LETTER = (
    "A",
    "A.",
    "(A)",
    "a",
    "Answer: A",
    "ANSWER: A",
    "Answer = A",
    "Answer - A",
    "Answer:\nA",
    "The answer is A",
    "The answer is A.",
    "The best answer is: A",
    "The correct answer is (A)",
    "So the answer is A.",
    "Therefore, the correct option is A",
    "Sure! The answer is A",
    "I think it is A",
    "I would choose A",
    "It's A",
    "Option A",
    "option a",
    "Choice: A",
    "A) red",
    "A: red",
    "A. red",
    "A? ",
    "A - red",
    "A (red)",
    "A, because it is red",
    "A because it is red",
    "A is correct",
    "A\n\nBecause",
    "(A) a red square",
    "(A",
    "A)",
    "( A )",
    "[A]",
    "<A>",
    "'A'",
    '"A"',
    "“A”",
    "**A**",
    "**A.** red",
    "**Answer: A**",
    "`A`",
    "$A$",
    "\\boxed{A}",
    "<answer>A</answer>",
    " A\n",
    "Ａ",
    "Ａ．红色",
    "（A）",
    "［A］",
    "A。",
    "A、红色",
    "A）红色",
    "答案：A",
    "答案是A",
    "【答案】A",
    "正确答案是A。",
    "选项A",
    "选A",
)
NO_LETTER = (
    "B",
    "",
    "A red ball",
    "A man is walking",
    "A dog. A cat",
    "The answer is a red ball",
    "It is a dog",
    "Apple",
    "apple",
    "AB",
    "A1",
    "A_1",
    "A's",
    "A+",
    "A-",
    "A#",
    "A-flat",
    "A and B",
    "A or B",
    "A nor B",
    "A & B",
    "A, B",
    "A,B",
    "A/B",
    "A B",
    "A.B",
    "(A) and (B)",
    "(A)(B)",
    "A)B)",
    "Option A or B",
    "Both A and B",
    "not A",
    "Answer",
    "The answer is",
    "(",
)


@pytest.mark.parametrize("reply", LETTER)
@pytest.mark.parametrize("answer", ["A", "(A)", "a.", "(A) red", "A. red", "Answer: (A) red"])
def test_replies_that_choose_the_letter(reply, answer):
    assert is_correct(reply, answer)
    assert not is_correct(reply, "B")


@pytest.mark.parametrize("reply", NO_LETTER)
def test_replies_that_choose_no_letter_or_another(reply):
    assert not is_correct(reply, "A")


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (" Red. ", "red", True),
        ("(red)", "Red", True),
        ("[red]", "red", True),
        ('"red"', "red", True),
        ("“red”", "red", True),
        ("**red**", "red", True),
        ("red...", "red", True),
        ("The answer is red", "red", True),
        ("Answer: red", "red", True),
        ("the red ball", "red ball", True),
        ("a red ball", "Red  ball", True),
        ("red\nball", "red ball", True),
        ("red ball\u00a0", "red ball", True),
        ("reddish", "red", False),
        ("", "red", False),
        ("", "", True),
        ("x", "", False),
        ("Yes,", "yes", True),
        ("Yes!", "yes", True),
        ("yes, it is", "Yes", False),
        ("No", "Yes", False),
        ("cafe\u0301", "caf\u00e9", True),
        ("STRASSE", "Straße", True),
        ("i\u0307", "İ", True),
        ("É", "é", True),
        ("2.0", "2", True),
        ("1,000", "1000", True),
        ("٣", "3", True),
        ("-1", "1", False),
        ("10", "1", False),
        ("1 apple", "1", False),
        ("3%", "3", False),
        ("two", "2", False),
        ("B", "B. sit", True),
        ("sit", "B. sit", True),
        ("b", "(B) sit", True),
        ("stand", "B. sit", False),
        ("C. sit", "B. sit", False),
        ("B a red square", "B", True),
        ("B or C", "B", False),
        ("I'm not sure", "I", False),
        ("I think it is B", "I", False),
        ("C++", "C", False),
        ("C#", "C", False),
        ("C++", "c++", True),
        ("D'accord", "D", False),
        ("(a) (b)", "(a) (b)", True),
        ("A and B", "a and b", True),
    ],
)
def test_what_counts_as_the_answer(reply, answer, right):
    assert is_correct(reply, answer) is right


@given(st.text(max_size=80), st.text(max_size=20))
def test_any_reply_can_be_judged(reply, answer):
    assert is_correct(answer, answer)
    assert is_correct(reply, answer) in (True, False)


items = st.frozensets(st.integers(0, 5), max_size=2)
media = st.builds(lambda count, asked, more: MediaContents(count, asked, asked | more), st.integers(0, 2), items, items)
questions = st.lists(st.tuples(st.sampled_from("fg"), st.sampled_from(["x", "X.", "y", "z"]), media))


@given(questions, st.integers(0, 9))
def test_partners_answer_otherwise_and_show_other_media(asked, seed):
    families, answers, contents = ([row[k] for row in asked] for k in range(3))
    partners = blind_partners(families, answers, contents, seed)
    assert partners == blind_partners(families, answers, contents, seed)
    for i, found in enumerate(partners):
        fits = [
            j
            for j in range(len(asked))
            if contents[i].items
            and families[j] == families[i]
            and contents[j].items >= contents[i].items
            and not contents[i].asked & contents[j].shown
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
    alone = summarize("f", "generation", right, {"blind": None, "shuffled": ~right}, seed=0)
    assert {name: value for name, value in alone.items() if value is None}.keys() == set(BLIND_FIELDS)
    assert alone | dict.fromkeys(BLIND_FIELDS) == row | dict.fromkeys(BLIND_FIELDS)
