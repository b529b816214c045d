"""Pack the dialogues of a global batch into as few rows as possible, balanced by estimated FLOPs.

Ranks wait for each other in every micro-step. So the lost time is the sum over micro-steps of the most expensive row
less the mean. Rows of equal cost lose nothing, whatever the number of ranks. If one dialogue costs more than the mean
row, equal rows are impossible. Then the first rows, which ranks run at the same time as that dialogue, are filled up to
its cost, and the other rows share the rest (:func:`_targets`).

Rows do not depend on the number of ranks. Costs become integers before they are compared, so that rows are the same on
every processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from framestream.pipeline.config.loading import CostModel

UNITS = 1 << 32  #: integer cost of the most expensive dialogue
TOLERANCE = 0.002  #: fraction of the mean row; rows with a smaller excess over their target are not refined
ROUNDS = 2  #: most exchanges per row


def costs(cost: CostModel | None, patches: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Estimate the FLOPs of dialogues, float64 (n,): patch x patches + token x length + pair x length squared.

    Each dialogue is one attention segment of its row, so costs add up over a row. Without coefficients, the cost is the
    length.
    """
    if cost is None:
        return lengths.astype(np.float64)
    lengths = lengths.astype(np.float64)
    return cost.patch * patches + cost.token * lengths + cost.pair * lengths**2


def pack(lengths: np.ndarray, cost: np.ndarray, max_tokens: int, row_multiple: int) -> list[np.ndarray]:
    """Split n dialogues into R rows of at most ``max_tokens`` tokens.

    R is the smallest multiple of ``row_multiple`` for which longest-processing-time packing finds room for all. It
    takes the most expensive dialogue first, and puts each into the row furthest below its target that has room (the
    first of equals). Then dialogues move out of the row furthest above its target, alone or in exchange, as long as
    that helps.

    Args:
        lengths: int (n,), tokens of each dialogue, none over ``max_tokens``.
        cost: float (n,), estimated FLOPs of each dialogue.

    Returns:
        R arrays of indices into ``lengths``, ascending within a row. Rows have descending cost, so that neighbors,
        which ranks run at the same time, are similar. Rows may be empty.
    """
    units = _units(lengths, cost, max_tokens)
    target, row_of = _assign_rows(lengths, units, max_tokens, row_multiple)
    _refine(lengths, units, max_tokens, target, row_of)
    totals = np.bincount(row_of, units, len(target))  # integers below 2**53, so that their float sums are exact
    return [np.flatnonzero(row_of == row) for row in np.argsort(-totals, kind="stable")]


def count_rows(lengths: np.ndarray, cost: np.ndarray, max_tokens: int, row_multiple: int) -> int:
    """Return the number of rows of :func:`pack`, without the exchanges between rows."""
    return len(_assign_rows(lengths, _units(lengths, cost, max_tokens), max_tokens, row_multiple)[0])


def load_balance(costs: Sequence[np.ndarray], ranks: int) -> float:
    """Compute the share of the ranks' time that is not spent waiting for each other, in one global batch.

    It is the mean over the maximum cost of the rows that ``ranks`` run at the same time, over all micro-steps.

    Args:
        costs: the costs of the dialogues of each row, row by row.
    """
    totals = np.array([row.sum() for row in costs]).reshape(-1, ranks)
    most = float(totals.max(axis=1).sum())
    return float(totals.sum()) / (most * ranks) if most else 1.0


def _units(lengths: np.ndarray, cost: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return the costs as integers, int64 (n,)."""
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(f"a dialogue of {lengths.max()} tokens does not fit a row of {max_tokens}")
    most = cost.max(initial=0.0) or 1.0
    return (cost / most * UNITS).astype(np.int64)


def _assign_rows(
    lengths: np.ndarray, units: np.ndarray, max_tokens: int, row_multiple: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the target cost of each row, int64 (R,), and the row of each dialogue, int64 (n,), for the smallest R.

    For each number of rows, stepped targets are tried first, then equal ones.
    """
    total = int(units.sum())
    order = np.lexsort((np.arange(len(lengths)), -lengths, -units))
    fewest = max(1, -(-int(lengths.sum()) // (max_tokens * row_multiple)))
    count = fewest * row_multiple
    while True:  # ends at the latest with one row per dialogue
        stepped = np.array(_targets(total, units[order].tolist(), count, row_multiple))
        for target in (stepped, np.full(count, total // count)):
            row_of = _pack_longest_first(lengths, units, order, max_tokens, target)
            if row_of is not None:
                return target, row_of
        count += row_multiple


def _targets(total: int, descending: list[int], count: int, row_multiple: int) -> list[int]:
    """Return the costs that ``count`` rows should have: equal ones, or steps if a dialogue costs more than the mean.

    A step is ``row_multiple`` rows, or half of the remaining rows if no more than ``row_multiple`` remain. Numbers of
    ranks are mostly of that form.
    """
    mean = -(-total // count)
    step = row_multiple if count > row_multiple else count // 2
    if not descending or descending[0] <= mean or not step:
        return [mean] * count
    high = min(descending[0], -(-total // step))
    return [high] * step + _targets(max(total - high * step, 0), descending[step:], count - step, row_multiple)


def _pack_longest_first(
    lengths: np.ndarray, units: np.ndarray, order: np.ndarray, max_tokens: int, target: np.ndarray
) -> np.ndarray | None:
    """Return the row of each dialogue, int64 (n,), or None if a dialogue fits no row."""
    left, room = target.copy(), np.full(len(target), max_tokens)
    row_of = np.empty(len(lengths), dtype=np.int64)
    lowest = np.iinfo(np.int64).min
    for item, length, cost in zip(order.tolist(), lengths[order].tolist(), units[order].tolist(), strict=True):
        row = int(np.where(room >= length, left, lowest).argmax())
        if room[row] < length:
            return None
        left[row] -= cost
        room[row] -= length
        row_of[item] = row
    return row_of


def _refine(lengths: np.ndarray, units: np.ndarray, max_tokens: int, target: np.ndarray, row_of: np.ndarray) -> None:
    """Lower the largest excess over a target repeatedly, by changing ``row_of`` in place.

    A dialogue of the row with the largest excess moves to another row, alone or in exchange for one of that row. Of all
    such moves, the one that leaves the smallest maximum excess of the two rows is returned.
    """
    count = len(target)
    # One dialogue of length and cost 0 per row, so that a move is an exchange with it.
    lengths, units = (np.concatenate([values, np.zeros(count, dtype=np.int64)]) for values in (lengths, units))
    rows = np.concatenate([row_of, np.arange(count)])
    excess = np.bincount(rows, units, count).astype(np.int64) - target
    room = max_tokens - np.bincount(rows, lengths, count).astype(np.int64)
    tolerance = TOLERANCE * float(target.mean())
    for _ in range(ROUNDS * count):
        top = int(excess.argmax())
        if excess[top] <= tolerance:
            break
        members = np.flatnonzero(rows[: len(row_of)] == top)
        gain = units[members, None] - units
        longer = lengths[members, None] - lengths
        after = np.maximum(excess[top] - gain, excess[rows] + gain)
        after[(gain <= 0) | (longer > room[rows]) | (-longer > room[top]) | (rows == top)] = excess[top]
        moved, returned = np.unravel_index(int(after.argmin()), after.shape)
        if after[moved, returned] >= excess[top]:
            break
        item, other = int(members[moved]), int(rows[returned])
        excess[[top, other]] += np.array([-1, 1]) * gain[moved, returned]
        room[[top, other]] += np.array([1, -1]) * longer[moved, returned]
        rows[item] = other
        if returned < len(row_of):
            rows[returned] = top
    row_of[:] = rows[: len(row_of)]
