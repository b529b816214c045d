"""Decide whether answers are correct, choose partners for the blind control, and compute accuracies with intervals."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from framestream.trainer.evaluation.answer_rules import normalize_answer, parse_option, reply_letter

if TYPE_CHECKING:
    from framestream.pipeline.evaluation.questions import MediaContents

RESAMPLES = 2000  #: bootstrap resamples
MAX_PARTNERS = 4  #: partners of a question
IOU_THRESHOLDS = (0.3, 0.5, 0.7)  #: of R@1, for answers that are intervals
GOOD_IOU = 0.5  #: from which an answer that is an interval counts as right where it is shown
CONTROLS = ("blind", "shuffled")  #: other frames, and the same frames in another order


def is_good_iou(iou: float) -> bool:
    """Return whether an answer that is an interval counts as right where it is shown."""
    return iou >= GOOD_IOU


def is_correct(reply: str, answer: str) -> bool:
    """Return whether ``reply`` is the expected answer.

    A reply is correct if it equals the answer after normalization. If the answer is an option (``B``, ``(B) red``), the
    letter of a reply counts, and so does the text of the option. docs/evaluation.md has the rules as a table.
    """
    said = normalize_answer(reply)
    if said == normalize_answer(answer):
        return True
    option = parse_option(answer)
    if option is None:
        return False
    letter, text = option
    return reply_letter(reply) == letter or (bool(text) and said == normalize_answer(text))


def answer_key(answer: str) -> str:
    """Return what identifies an expected answer: its letter if it is an option, else its normalized text."""
    option = parse_option(answer)
    return f"({option[0]})" if option else normalize_answer(answer)


def blind_partners(
    families: Sequence[str], answers: Sequence[str], contents: Sequence[MediaContents], seed: int
) -> list[list[int]]:
    """Choose for each question up to :data:`MAX_PARTNERS` others of its family with a different answer.

    The first one is used; the others replace it if its media cannot be shown. Partners are chosen uniformly from the
    questions that show at least as many media, and nothing of what the question is about. A question without media has
    no partner.

    Args:
        families, answers: of each question.
        contents: what the media of each question contain.
        seed: of the random choice.
    """
    rng = np.random.default_rng(seed)
    by_family: dict[str, list[int]] = {}
    for i, family in enumerate(families):
        by_family.setdefault(family, []).append(i)
    showing: dict[Hashable, set[int]] = {}
    for i, media in enumerate(contents):
        for item in media.shown:
            showing.setdefault(item, set()).add(i)
    partners: list[list[int]] = []
    keys = [answer_key(answer) for answer in answers]
    for family, key, media in zip(families, keys, contents, strict=True):
        family_others = by_family[family] if media.items else []
        others = [j for j in family_others if keys[j] != key and contents[j].items >= media.items]
        for item in media.asked:
            others = [j for j in others if j not in showing.get(item, ())]
        partners.append(rng.permutation(others)[:MAX_PARTNERS].tolist() if others else [])
    return partners


def bootstrap_ci(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Compute the 95 % bootstrap percentile interval of the mean of ``values`` (n,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(
    family: str,
    method: str,
    correct: np.ndarray,
    controls: Mapping[str, np.ndarray | None],
    seed: int,
    name: str = "accuracy",
) -> dict:
    """Compute the mean score of one family and of its controls, in percent, with intervals.

    A gain is the score minus that of a control. Its interval resamples both answers of a question together.

    Args:
        family: name of the family.
        method: ``generation`` or ``likelihood``, or ``intervals``.
        correct: (n,) whether each question is answered correctly with its own frames, or its score in [0, 1].
        controls: the same under some of :data:`CONTROLS`, by name. None for one that the family does not have: its
            fields are None.
        seed: of the bootstrap.
        name: of the mean score in the row.

    Returns:
        one row of ``families`` in evaluation.json.
    """
    row: dict = {"family": family, "method": method, "questions": len(correct)}
    _add_mean(row, name, "", correct, seed)
    for condition, control in controls.items():
        _add_mean(row, condition, f"{condition}_", control, seed)
        gain = "gain" if condition == "blind" else f"{condition}_gain"
        difference = None if control is None else correct.astype(float) - control.astype(float)
        _add_mean(row, gain, f"{gain}_", difference, seed)
    return row


def format_points(value: float | None) -> str:
    """Format a number of ``families`` or ``grounding`` with one decimal; ``none`` for a control that was not asked."""
    return "none" if value is None else f"{value:.1f}"


def _add_mean(row: dict, name: str, prefix: str, values: np.ndarray | None, seed: int) -> None:
    """Add the mean of ``values`` in percent as ``name``, and its interval as ``low`` and ``high`` with ``prefix``."""
    if values is None:
        row |= dict.fromkeys((name, f"{prefix}low", f"{prefix}high"))
        return
    values = values.astype(float)
    low, high = bootstrap_ci(values, seed)
    row[name] = 100 * float(values.mean())
    row[f"{prefix}low"], row[f"{prefix}high"] = 100 * low, 100 * high
