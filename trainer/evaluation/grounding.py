"""Score answers that are intervals of time, as moment retrieval does.

The IoU of a reply is that of the first interval it states, with the true interval that it fits best. mIoU is the mean
over questions. R@1 at an IoU of m is the share of questions whose IoU is at least m (Charades-STA, arXiv 1705.02101;
ActivityNet Captions, arXiv 1705.00754; several true intervals as in QVHighlights, arXiv 2107.09609). A reply without an
interval has an IoU of 0.

Intervals are compared in seconds of the source (:class:`framestream.pipeline.evaluation.intervals.VideoClock`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from framestream.pipeline.evaluation.intervals import (
    Interval,
    IntervalError,
    VideoClock,
    parse_intervals,
    stated_intervals,
)
from framestream.pipeline.evaluation.questions import Question, QuestionSource
from framestream.trainer.evaluation.metrics import IOU_THRESHOLDS, format_points, summarize

ROUNDING = 1e-9  #: by which an IoU may miss a threshold, because seconds are sums of binary fractions


@dataclass(frozen=True, slots=True)
class GroundingScore:
    """The intervals of one question, in seconds of the source, and their IoUs, by condition."""

    expected: list[Interval]
    #: None where a reply states no interval, or was not asked for
    stated: dict[str, Interval | None] = field(default_factory=dict)
    ious: dict[str, float] = field(default_factory=dict)  #: of the conditions that were asked

    def to_dict(self) -> dict:
        """Return the fields of an answer in evaluation.json."""
        ious = {name: self.ious.get(name) for name in self.stated}
        return {"intervals": {"expected": self.expected, **self.stated}, "iou": ious}


def asks_for_interval(question: Question) -> bool:
    """Return whether the answer is an interval: by ``intervals`` of the annotation, or because the answer states one.

    A question with options is answered by one of them. An empty list of ``intervals`` says that it is another question.
    """
    if question.intervals is not None:
        return bool(question.intervals)
    return not question.options and bool(stated_intervals(question.answer))


def read_clock(questions: QuestionSource, i: int) -> VideoClock | None:
    """Return the clock of a question whose answer is an interval; None for other questions.

    Raises:
        IntervalError: its ``intervals`` cannot be shown.
    """
    question = questions[i]
    if not asks_for_interval(question):
        return None
    clock = questions.clock(i)
    if question.intervals and clock is None:
        raise IntervalError("intervals: the question must show one video and nothing else")
    if question.intervals and clock and not any(clock.crop(interval) for interval in question.intervals):
        shown = f"{clock.start:.2f} s to {clock.end:.2f} s"
        raise IntervalError(f"intervals: {question.intervals[:2]} are not in what is shown of the video, {shown}")
    return clock


def interval_iou(one: Interval, other: Interval) -> float:
    """Compute the intersection of two intervals over their union, in [0, 1]; 0 for two empty intervals."""
    both = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    union = (one[1] - one[0]) + (other[1] - other[0]) - both
    return both / union if union > 0 else 0.0


def score_replies(question: Question, clock: VideoClock, replies: Mapping[str, str | None]) -> GroundingScore:
    """Score the replies to one question, by condition.

    Args:
        question: its ``intervals`` are seconds of the source. Its answer has the seconds that the prompt states.
        clock: of the question's own video. It converts the replies of all conditions.
        replies: texts; None for a control that was not asked.
    """
    if question.intervals:
        cropped = (clock.crop(interval) for interval in question.intervals)
        expected = [interval for interval in cropped if interval]
    else:
        expected = [clock.to_source(interval) for interval in stated_intervals(question.answer)]
    score = GroundingScore(expected)
    for condition, reply in replies.items():
        if reply is None:
            score.stated[condition] = None
            continue
        found = parse_intervals(reply)
        stated = clock.to_source(found[0]) if found else None
        score.stated[condition] = stated
        score.ious[condition] = max((interval_iou(stated, true) for true in expected), default=0.0) if stated else 0.0
    return score


def summarize_grounding(family: str, scores: Sequence[GroundingScore], seed: int) -> dict:
    """Compute mIoU with intervals and controls, and R@1, in percent, of the questions of one family.

    Returns:
        one row of ``grounding`` in evaluation.json: that of :func:`.metrics.summarize` with ``miou`` in place of
        ``accuracy``, ``recall_0.3`` and so on, and ``unparsed``, the number of replies without an interval.
    """
    ious = {name: np.array([score.ious[name] for score in scores]) for name in scores[0].ious}
    own, controls = ious["own"], {name: ious.get(name) for name in scores[0].stated if name != "own"}
    row = summarize(family, "intervals", own, controls, seed, "miou")
    row |= {f"recall_{at}": 100 * float((own >= at - ROUNDING).mean()) for at in IOU_THRESHOLDS}
    row["unparsed"] = sum(score.stated["own"] is None for score in scores)
    return row


def format_grounding(rows: Sequence[Mapping]) -> list[str]:
    """Format ``grounding`` of evaluation.json as lines of text, one for each family; none without such questions."""
    if not rows:
        return []
    titles = ("questions", "mIoU", *(f"R@{at}" for at in IOU_THRESHOLDS), "blind", "shuffled", "gain", "unparsed")
    width = max([20, *(len(row["family"]) for row in rows)]) + 2
    lines = ["", f"{'family, by intervals':<{width}}" + "".join(title.rjust(10) for title in titles)]
    for row in rows:
        names = ("miou", *(f"recall_{at}" for at in IOU_THRESHOLDS), "blind", "shuffled", "gain")
        values = "".join(format_points(row[name]).rjust(10) for name in names)
        lines.append(f"{row['family']:<{width}}{row['questions']:>10}{values}{row['unparsed']:>10}")
    return lines
