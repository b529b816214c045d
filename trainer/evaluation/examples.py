"""Questions that are shown with their frames: the first ones of each family, and the first that were answered wrong."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from framestream.pipeline.evaluation.questions import QuestionSource
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.trainer.evaluation.grounding import GroundingScore
from framestream.trainer.evaluation.metrics import is_correct, is_good_iou

EXAMPLES_PER_FAMILY = 3  #: questions that are shown, and as many that were answered wrong
EXAMPLE_FRAMES = 16  #: most frames of an example
UNREADABLE = (OSError, ValueError, MediaError)  #: errors of one question's media or text; the question is left out


def choose_examples(
    questions: QuestionSource, scored: Sequence[int], is_wrong: Callable[[int], bool], limit: int
) -> list[int]:
    """Return the first ``limit`` questions of each family, then the first ``limit`` others that were answered wrong."""
    first = first_of_each_family(questions, scored, limit)
    shown = set(first)
    others = [i for i in scored if i not in shown and is_wrong(i)]
    return first + first_of_each_family(questions, others, limit)


def first_of_each_family(questions: QuestionSource, usable: Sequence[int], limit: int | None) -> list[int]:
    """Return the first ``limit`` questions of each family, all if None."""
    counts: dict[str, int] = {}
    chosen = []
    for i in usable:
        family = questions[i].family
        counts[family] = counts.get(family, 0) + 1
        if limit is None or counts[family] <= limit:
            chosen.append(i)
    return chosen


def make_examples(
    questions: QuestionSource,
    scored: Sequence[int],
    own: Mapping[int, str],
    blind: Mapping[int, str],
    grounded: Mapping[int, GroundingScore],
    limit: int,
) -> list[dict[str, Any]]:
    """Return examples with at most ``EXAMPLE_FRAMES`` evenly spread frames, as in evaluation.json.

    Args:
        questions: all questions.
        scored: numbers of those that were asked.
        own: generated answers by number, with the question's own frames.
        blind: the same with the frames of another question.
        grounded: scores of answers that are intervals of time.
        limit: see :func:`choose_examples`.
    """

    def is_wrong(i: int) -> bool:
        if i in grounded:
            return not is_good_iou(grounded[i].ious["own"])
        return not is_correct(own[i], questions[i].answer)

    shown = []
    for i in choose_examples(questions, scored, is_wrong, limit):
        with contextlib.suppress(*UNREADABLE):  # a file that changed since it was asked about
            frames = questions.some_images(i, EXAMPLE_FRAMES)
            example: dict[str, Any] = {
                "family": questions[i].family,
                "question": questions[i].text,
                "expected": questions[i].answer,
                "given": own[i],
                "blind_given": blind.get(i),
                "frames_jpeg": [base64.b64encode(encode_jpeg(f, 85, "420")).decode("ascii") for f in frames],
            }
            if i in grounded:
                example["iou"] = grounded[i].ious["own"]
            shown.append(example)
    return shown
