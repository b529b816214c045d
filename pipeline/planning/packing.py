"""A global batch to rows: as few as fit, balanced by estimated FLOPs, independent of the number of ranks.

Ranks wait for each other in every micro-step, so what is lost is the sum over micro-steps of the costliest row less the
mean. Rows of equal cost lose nothing, whatever the number of ranks. Where one dialogue costs more than the mean row,
equal rows cannot be had: then the first rows, which ranks run side by side with it, are filled up to its cost, and the
others share what is left (:func:`_targets`). Costs become integers before anything is compared, so that rows are the
same on every processor.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from framestream.pipeline.config.loading import CostModel

UNITS = 1 << 32  #: of cost that the costliest dialogue has
TOLERANCE = 0.002  #: share of the mean row; rows that are no further above their target are not refined
ROUNDS = 2  #: exchanges, at most, for each row


def costs(cost: CostModel | None, patches: np.ndarray, lengths: np.ndarray) -> np.ndarray:
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
    costliest dialogue first, each into the row furthest below its target that has room (the first of equals). Then
    dialogues are moved and exchanged out of the row furthest above its target, as long as that helps.

    Args:
        lengths: int (n,), tokens of each dialogue, none over ``max_tokens``.
        cost: float (n,), estimated FLOPs of each dialogue.

    Returns:
        R arrays of places in ``lengths``, ascending in a row; rows by falling cost, so that neighbours, which ranks run
        side by side, are alike. Rows may be empty.
    """
    if len(lengths) and lengths.max() > max_tokens:
        raise ValueError(f"a dialogue of {lengths.max()} tokens does not fit a row of {max_tokens}")
    most = cost.max(initial=0.0) or 1.0
    units = (cost / most * UNITS).astype(np.int64)
    first = np.lexsort((np.arange(len(lengths)), -lengths, -units))
    least = max(1, -(-int(lengths.sum()) // (max_tokens * row_multiple)))
    for multiple in range(least, len(lengths) + 2):
        count = multiple * row_multiple
        level = np.full(count, int(units.sum()) // count)
        target = np.array(_targets(int(units.sum()), units[first].tolist(), count, row_multiple))
        for wanted in (target, level):
            row_of = _lpt(lengths, units, first, max_tokens, wanted)
            if row_of is not None:
                break
        else:
            continue
        break
    _refine(lengths, units, max_tokens, wanted, row_of)
    totals = np.bincount(row_of, units, count)  # whole numbers below 2**53, so that their sums are exact
    return [np.flatnonzero(row_of == row) for row in np.argsort(-totals, kind="stable")]


def load_balance(costs: Sequence[np.ndarray], ranks: int) -> float:
    """Mean over max cost of the rows that ``ranks`` run side by side, over all micro-steps of a global batch: the share
    of the ranks' time that is not spent waiting for each other.

    Args:
        costs: the costs of each row's dialogues, row by row.
    """
    totals = np.array([row.sum() for row in costs]).reshape(-1, ranks)
    most = float(totals.max(axis=1).sum())
    return float(totals.sum()) / (most * ranks) if most else 1.0


def _targets(total: int, falling: list[int], count: int, row_multiple: int) -> list[int]:
    """Costs that ``count`` rows should have: equal ones, or steps where a dialogue costs more than that.

    A step is ``row_multiple`` rows, or half of those that are left of them, as numbers of ranks mostly are.
    """
    mean = -(-total // count)
    step = row_multiple if count > row_multiple else count // 2
    if not falling or falling[0] <= mean or not step:
        return [mean] * count
    high = min(falling[0], -(-total // step))
    return [high] * step + _targets(max(total - high * step, 0), falling[step:], count - step, row_multiple)


def _lpt(
    lengths: np.ndarray, units: np.ndarray, first: np.ndarray, max_tokens: int, target: np.ndarray
) -> np.ndarray | None:
    """The row of each dialogue, int64 (n,); None where one finds no room."""
    left, room = target.copy(), np.full(len(target), max_tokens)
    row_of = np.empty(len(lengths), dtype=np.int64)
    lowest = np.iinfo(np.int64).min
    for item, length, cost in zip(first.tolist(), lengths[first].tolist(), units[first].tolist(), strict=True):
        row = int(np.where(room >= length, left, lowest).argmax())
        if room[row] < length:
            return None
        left[row] -= cost
        room[row] -= length
        row_of[item] = row
    return row_of


def _refine(lengths: np.ndarray, units: np.ndarray, max_tokens: int, target: np.ndarray, row_of: np.ndarray) -> None:
    """Lower the largest excess over a target, in place: a dialogue of that row goes to another row, alone or in
    exchange, whichever leaves the lower of the two excesses' maximum."""
    count = len(target)
    # A place for nothing in every row makes a move an exchange with nothing.
    lengths, units = (np.concatenate([values, np.zeros(count, dtype=np.int64)]) for values in (lengths, units))
    places = np.concatenate([row_of, np.arange(count)])
    excess = np.bincount(places, units, count).astype(np.int64) - target
    room = max_tokens - np.bincount(places, lengths, count).astype(np.int64)
    enough = TOLERANCE * float(target.mean())
    for _ in range(ROUNDS * count):
        top = int(excess.argmax())
        if excess[top] <= enough:
            break
        mine = np.flatnonzero(places[: len(row_of)] == top)
        gain = units[mine, None] - units
        longer = lengths[mine, None] - lengths
        after = np.maximum(excess[top] - gain, excess[places] + gain)
        after[(gain <= 0) | (longer > room[places]) | (-longer > room[top]) | (places == top)] = excess[top]
        given, taken = np.unravel_index(int(after.argmin()), after.shape)
        if after[given, taken] >= excess[top]:
            break
        item, other = int(mine[given]), int(places[taken])
        excess[[top, other]] += np.array([-1, 1]) * gain[given, taken]
        room[[top, other]] += np.array([1, -1]) * longer[given, taken]
        places[item] = other
        if taken < len(row_of):
            places[taken] = top
    row_of[:] = places[: len(row_of)]
