"""Order of an epoch: a pure function of the dialogues, the seed and the epoch's number."""

from __future__ import annotations

import hashlib

import numpy as np


def epoch_order(rows: np.ndarray, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """``rows`` (numbers of dialogues, ascending) in the order of one epoch, same dtype and length.

    Every row gets a 64-bit hash of (seed, epoch, row) and rows are sorted by it, so that the order depends on no
    library's random numbers and takes O(n log n) whatever the epoch.
    """
    if not shuffle:
        return rows
    start = int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")
    return rows[np.argsort(_mixed(rows.astype(np.uint64) + np.uint64(start)), kind="stable")]


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers whose bits look independent."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
