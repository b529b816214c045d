"""Decide whether answers are correct, choose partners for the blind control, and compute accuracies with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from framestream.trainer.evaluation.answer_rules import normalize_answer, parse_option, reply_letter

RESAMPLES = 2000  #: bootstrap resamples
MAX_PARTNERS = 4  #: partners of a question
CONTROLS = ("blind", "shuffled")  #: other frames, and the same frames in another order


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


def blind_partners(families: Sequence[str], answers: Sequence[str], shown: Sequence[int], seed: int) -> list[list[int]]:
    """Choose for each question up to :data:`MAX_PARTNERS` others of its family with a different answer.

    The first one is used; the others replace it if its media cannot be shown. Partners are chosen uniformly from the
    questions that show at least as many media. A question without media has no partner.

    Args:
        families, answers: of each question.
        shown: number of media of each question.
        seed: of the random choice.
    """
    rng = np.random.default_rng(seed)
    by_family: dict[str, list[int]] = {}
    for i, family in enumerate(families):
        by_family.setdefault(family, []).append(i)
    partners: list[list[int]] = []
    keys = [answer_key(answer) for answer in answers]
    for family, key, count in zip(families, keys, shown, strict=True):
        family_others = by_family[family] if count else []
        others = [j for j in family_others if keys[j] != key and shown[j] >= count]
        partners.append(rng.permutation(others)[:MAX_PARTNERS].tolist() if others else [])
    return partners


def bootstrap_ci(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Compute the 95 % bootstrap percentile interval of the mean of ``values`` (n,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(family: str, method: str, correct: np.ndarray, controls: Mapping[str, np.ndarray], seed: int) -> dict:
    """Compute the accuracy of one family and of its controls, in percent, with intervals.

    A gain is the accuracy minus that of a control. Its interval resamples both answers of a question together.

    Args:
        family: name of the family.
        method: ``generation`` or ``likelihood``.
        correct: (n,) whether each question is answered correctly with its own frames.
        controls: the same under some of :data:`CONTROLS`, by name.
        seed: of the bootstrap.

    Returns:
        one row of ``families`` in evaluation.json.
    """
    row: dict = {"family": family, "method": method, "questions": len(correct)}
    _add_mean(row, "accuracy", "", correct, seed)
    for name, control in controls.items():
        _add_mean(row, name, f"{name}_", control, seed)
        gain = "gain" if name == "blind" else f"{name}_gain"
        _add_mean(row, gain, f"{gain}_", correct.astype(float) - control.astype(float), seed)
    return row


def _add_mean(row: dict, name: str, prefix: str, values: np.ndarray, seed: int) -> None:
    """Add the mean of ``values`` in percent as ``name``, and its interval as ``low`` and ``high`` with ``prefix``."""
    values = values.astype(float)
    low, high = bootstrap_ci(values, seed)
    row[name] = 100 * float(values.mean())
    row[f"{prefix}low"], row[f"{prefix}high"] = 100 * low, 100 * high
