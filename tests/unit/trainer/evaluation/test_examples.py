"""Which questions a report shows: some of each family, and failures among the others."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from framestream.trainer.evaluation.examples import EXAMPLE_FRAMES, make_examples
from framestream.trainer.evaluation.grounding import GroundingScore

FAMILIES = ("side", "shape", "side", "side", "shape", "side", "side")


class Questions(dict):
    """Questions by number, with frames that can be read but for those of question 6."""

    def some_images(self, i: int, most: int) -> list[np.ndarray]:
        assert most == EXAMPLE_FRAMES
        if i == 6:
            raise OSError("gone")
        return [np.zeros((16, 16, 3), np.uint8)]


def shown(wrong: set[int], grounded: dict | None = None, limit: int = 1) -> list[tuple[str, str]]:
    questions = Questions({i: SimpleNamespace(family=f, text=f"{i}?", answer="left") for i, f in enumerate(FAMILIES)})
    own = {i: "right" if i in wrong else "Left." for i in questions}
    found = make_examples(questions, list(questions), own, {0: "up"}, grounded or {}, limit)
    assert all(example["expected"] == "left" and example["frames_jpeg"] for example in found)
    return [(example["question"], example["given"]) for example in found]


def test_failures_follow_the_first_questions_of_each_family():
    assert shown(set()) == [("0?", "Left."), ("1?", "Left.")]
    assert shown({3, 5}) == [("0?", "Left."), ("1?", "Left."), ("3?", "right")]
    assert shown({0, 4}) == [("0?", "right"), ("1?", "Left."), ("4?", "right")]
    assert shown({3, 4, 5}, limit=2) == [(f"{i}?", "right" if i > 2 else "Left.") for i in (0, 1, 2, 4, 3, 5)]


def test_no_examples_are_made_for_a_limit_of_zero_or_of_lost_files():
    assert shown({0, 1, 2, 3}, limit=0) == []
    assert shown({6}) == [("0?", "Left."), ("1?", "Left.")]


def test_an_interval_is_wrong_by_its_iou():
    scores = {
        i: GroundingScore([(0.0, 4.0)], {"own": None}, {"own": iou}) for i, iou in ((0, 0.4), (2, 0.5), (3, 0.49))
    }
    assert shown(set(), scores) == [("0?", "Left."), ("1?", "Left."), ("3?", "Left.")]
