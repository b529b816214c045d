"""How safe the choices of token merging are: rounding must not change them where results are compared."""

from __future__ import annotations

import numpy as np


def margin(patches: np.ndarray, wanted: int, heads: int) -> float:
    """The least difference of cosine similarities that a choice of merging (P, C) patches hangs on, in float64.

    In each round these are: which odd token a merged token goes to, which tokens are merged, and the order of those
    that are not.
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
