"""Margins of token merging: rounding must not change its choices where tests compare results."""

from __future__ import annotations

import numpy as np


def margin(patches: np.ndarray, wanted: int, heads: int) -> float:
    """Return the smallest float64 difference of cosine similarities that decides a choice of merging (P, C) patches.

    The choices of a round are the odd token that each merged token is added to, the merged tokens, and the order of the
    other tokens.
    """
    keys = patches.astype(np.float64).reshape(len(patches), heads, -1).mean(1)
    least = np.inf
    while len(keys) > wanted:
        removed = min(len(keys) // 2, len(keys) - wanted)
        unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
        similarity = unit[0::2] @ unit[1::2].T
        best = similarity.max(axis=1)
        order = np.argsort(-best, kind="stable")
        second, first = np.sort(similarity[order[:removed]], axis=1)[:, -2:].T
        least = min([least, *(first - second), *-np.diff(best[order[removed - 1 :]])])
        odd = keys[1::2].copy()
        np.add.at(odd, similarity.argmax(axis=1)[order[:removed]], keys[0::2][order[:removed]])
        keys = np.concatenate([keys[0::2][order[removed:]], odd])
    return float(least)
