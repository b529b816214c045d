"""A global batch to rows: as few as fit, balanced by estimated FLOPs, independent of the number of ranks."""

from __future__ import annotations

import numpy as np

from pipeline.manifest import Cost


def costs(cost: Cost | None, patches: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Estimated FLOPs of dialogues, float64 (n,): patch x patches + token x length + pair x length squared.

    Each dialogue is one attention segment of its row, so costs add up over a row. Without coefficients: the length.
    """
    if cost is None:
        return lengths.astype(np.float64)
    lengths = lengths.astype(np.float64)
    return cost.patch * patches + cost.token * lengths + cost.pair * lengths**2


def pack(lengths: np.ndarray, cost: np.ndarray, max_tokens: int, row_multiple: int) -> list[np.ndarray]:
    """Split n dialogues into R rows of at most ``max_tokens`` tokens.

    R is the smallest multiple of ``row_multiple`` for which longest-processing-time packing finds room for all: the
    costliest dialogue first, each into the row of least cost that has room (the first of equals).

    Args:
        lengths: int (n,), tokens of each dialogue, none over ``max_tokens``.
        cost: float (n,), estimated FLOPs of each dialogue.

    Returns:
        R arrays of places in ``lengths``, ascending in a row; rows by falling cost, so that neighbours, which ranks run
        side by side, are alike. Rows may be empty.
    """
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(f"a dialogue of {lengths.max()} tokens does not fit a row of {max_tokens}")
    first = np.lexsort((np.arange(len(lengths)), -lengths, -cost))
    least = max(1, -(-int(lengths.sum()) // (max_tokens * row_multiple)))
    for multiple in range(least, len(lengths) + 2):
        rows = _lpt(lengths, cost, first, max_tokens, multiple * row_multiple)
        if rows is not None:
            break
    totals = np.array([cost[row].sum() for row in rows])
    return [rows[i] for i in np.argsort(-totals, kind="stable")]


def _lpt(
    lengths: np.ndarray, cost: np.ndarray, first: np.ndarray, max_tokens: int, count: int
) -> list[np.ndarray] | None:
    load, room = np.zeros(count), np.full(count, max_tokens)
    rows: list[list[int]] = [[] for _ in range(count)]
    for item in first.tolist():
        row = int(np.where(room >= lengths[item], load, np.inf).argmin())
        if room[row] < lengths[item]:
            return None
        load[row] += cost[item]
        room[row] -= lengths[item]
        rows[row].append(item)
    return [np.array(sorted(row), dtype=np.int64) for row in rows]
