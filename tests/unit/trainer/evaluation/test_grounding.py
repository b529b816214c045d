"""mIoU and R@1 of intervals: a table worked out by hand, and an independent computation on a grid of seconds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.evaluation.intervals import VideoClock
from framestream.pipeline.evaluation.questions import Question
from framestream.trainer.evaluation.grounding import (
    asks_for_interval,
    format_grounding,
    interval_iou,
    score_replies,
    summarize_grounding,
)
from framestream.trainer.evaluation.run_files import BLIND_FIELDS

PLAIN = VideoClock([0.0], [0.0], 0.0, 100.0)
#: (true intervals, reply, IoU)
TABLE = (
    ([[0, 10]], "from 0 to 10 seconds", 1.0),
    ([[0, 10]], "[0, 5]", 0.5),
    ([[0, 10]], "5 - 15", 1 / 3),
    ([[0, 10]], "15 - 5", 1 / 3),  # reversed
    ([[0, 10]], "10 - 20", 0.0),
    ([[0, 10]], "It is at the beginning.", 0.0),
    ([[0, 10]], "5 - 5", 0.0),
    ([[0, 10], [20, 30]], "20 - 27", 0.7),  # the true interval that it fits best
    ([[0, 10]], "50 - 60 seconds, or 0 - 10 seconds", 0.0),  # the first is its answer
    ([[90, 120]], "90 - 100", 1.0),  # the video ends at 100 s
)


def question(answer: str = "a", **meta) -> Question:
    turns = [{"from": "human", "value": "<image>\nWhen?"}, {"from": "gpt", "value": answer}]
    return Question.from_turns("key", turns, "entry", meta, [0])


def test_a_table_worked_out_by_hand():
    scores = [score_replies(question(intervals=true), PLAIN, {"own": said, "blind": ""}) for true, said, _ in TABLE]
    assert [score.ious["own"] for score in scores] == pytest.approx([iou for *_, iou in TABLE])
    row = summarize_grounding("moments", scores, seed=0)
    assert row["questions"] == 10 and row["unparsed"] == 1 and row["blind"] == 0.0
    assert row["miou"] == pytest.approx(100 * (1 + 0.5 + 1 / 3 + 1 / 3 + 0.7 + 1) / 10)
    assert [row[f"recall_{at}"] for at in (0.3, 0.5, 0.7)] == pytest.approx([60.0, 40.0, 30.0])
    assert row["gain"] == pytest.approx(row["miou"]) and row["low"] < row["miou"] < row["high"]
    titles, line = format_grounding([row | {"shuffled": 0.0}])[1:]
    unasked = [score_replies(question(intervals=true), PLAIN, {"own": said, "blind": None}) for true, said, _ in TABLE]
    assert summarize_grounding("moments", unasked, seed=0) == row | dict.fromkeys(BLIND_FIELDS)
    assert "mIoU" in titles and "R@0.5" in titles and line.split()[:4] == ["moments", "10", "38.7", "60.0"]


tenths = st.tuples(st.integers(0, 300), st.integers(1, 200)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(tenths, tenths)
def test_the_iou_is_that_of_counted_tenths_of_seconds(one, other):
    grid = np.arange(600)
    inside = [(grid >= start) & (grid < end) for start, end in (one, other)]
    expected = (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()
    scaled = [(start / 10, end / 10) for start, end in (one, other)]
    assert interval_iou(*scaled) == pytest.approx(expected) == pytest.approx(interval_iou(*scaled[::-1]))


def test_a_clip_is_scored_in_seconds_of_its_source():
    clip = VideoClock([0.0], [60.0], 60.0, 90.0)
    by_annotation = score_replies(question(intervals=[[62, 66]]), clip, {"own": "2 - 6"})
    by_answer = score_replies(question("2.0 - 6.0 seconds"), clip, {"own": "2 - 6"})
    for score in (by_annotation, by_answer):
        assert score.ious == {"own": 1.0} and score.expected == [(62, 66)] and score.stated == {"own": (62, 66)}


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (question("The given query happens in 0.0 - 6.9 seconds."), True),
        (question("a red ball"), False),
        (question("at the end", intervals=[[1, 2]]), True),
        (question("3.2 - 10.5", intervals=[]), False),
        (question("3.2 - 10.5", options=["3.2 - 10.5", "1.0 - 2.0"]), False),
    ],
)
def test_which_questions_ask_for_an_interval(asked, expected):
    assert asks_for_interval(asked) is expected
