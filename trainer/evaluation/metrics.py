"""Right or wrong, partners for the blind control, and shares with their intervals. Pure arithmetic."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np

RESAMPLES = 2000  #: bootstrap resamples
MAX_PARTNERS = 4  #: partners of a question
CONTROLS = ("blind", "shuffled")  #: other frames, and the same frames in another order


def normalize_answer(text: str) -> str:
    """Case, surrounding space, brackets around all of it and a final full stop do not count."""
    plain = text.strip().lower().rstrip(".").strip()
    return plain[1:-1].strip() if re.fullmatch(r"\([^()]*\)", plain) else plain


def is_correct(given: str, answer: str) -> bool:
    """Whether a reply is the answer. Where that is a single letter, a reply may go on after it: ``(B) a square``."""
    expected = normalize_answer(answer)
    if re.fullmatch(r"[a-z]", expected):
        first = re.match(r"\(?([a-z])(?![a-z'’])", given.strip().lower())
        return bool(first) and first[1] == expected
    return normalize_answer(given) == expected


def blind_partners(families: Sequence[str], answers: Sequence[str], shown: Sequence[int], seed: int) -> list[list[int]]:
    """For each question up to :data:`TRIES` others of its family with a different answer, the first to be taken, the
    rest where its media cannot be shown; none where there is none.

    Partners are drawn uniformly among those that show at least as many media; a question without media has none.
    """
    rng = np.random.default_rng(seed)
    by_family: dict[str, list[int]] = {}
    for i, family in enumerate(families):
        by_family.setdefault(family, []).append(i)
    partners: list[list[int]] = []
    for family, answer, count in zip(families, answers, shown, strict=True):
        family_others = by_family[family] if count else []
        others = [
            j for j in family_others if normalize_answer(answers[j]) != normalize_answer(answer) and shown[j] >= count
        ]
        partners.append(rng.permutation(others)[:MAX_PARTNERS].tolist() if others else [])
    return partners


def bootstrap_ci(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the mean of ``values`` (n,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(family: str, method: str, right: np.ndarray, controls: Mapping[str, np.ndarray], seed: int) -> dict:
    """Accuracy of one family beside its controls, in points of 100, with intervals.

    The interval of a gain resamples both answers of a question together.

    Args:
        method: how answers were had: ``generation`` or ``likelihood``.
        right: (n,) whether each question was answered rightly with its own frames.
        controls: the same under some of :data:`CONTROLS`, by name.
    """
    row: dict = {"family": family, "method": method, "questions": len(right)}
    _put(row, "accuracy", "", right, seed)
    for name, control in controls.items():
        _put(row, name, f"{name}_", control, seed)
        gain = "gain" if name == "blind" else f"{name}_gain"
        _put(row, gain, f"{gain}_", right.astype(float) - control.astype(float), seed)
    return row


def _put(row: dict, name: str, prefix: str, values: np.ndarray, seed: int) -> None:
    values = values.astype(float)
    low, high = bootstrap_ci(values, seed)
    row[name] = 100 * float(values.mean())
    row[f"{prefix}low"], row[f"{prefix}high"] = 100 * low, 100 * high
