"""Order of an epoch: a pure function of the dialogues, their lengths, the seed and the epoch's number."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from pipeline import grouping
from pipeline.manifest import Batching


def epoch_order(rows: np.ndarray, lengths: np.ndarray, batching: Batching, seed: int, epoch: int) -> np.ndarray:
    """``rows`` (numbers of dialogues, ascending) in the order of one epoch, same dtype; see ``batching.order``.

    ``modality_length`` alone leaves some out, as many in every epoch.

    Args:
        lengths: int (n,), tokens of each dialogue, negative for text without media.
    """
    start = epoch_start(seed, epoch)
    size, shares = batching.global_batch, batching.row_multiple
    generator = torch.Generator().manual_seed(start)
    match batching.order:
        case "shuffle":
            return shuffled(rows, start)
        case "sequential":
            return rows
        case "length":
            return rows[grouping.length(np.abs(lengths), size, shares, generator)]
        case "length_windows":
            return rows[grouping.length_windows(np.abs(lengths), size, generator)]
        case "modality":
            return rows[grouping.modality(lengths, size, shares, generator)]
        case _:  # modality_length
            return rows[grouping.modality_length(lengths, size, shares, generator)]


def epoch_start(seed: int, epoch: int) -> int:
    """The 64-bit number that all of an epoch's order comes from."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")


def shuffled(rows: np.ndarray, start: int) -> np.ndarray:
    """A permutation of ``rows`` that no library's random numbers decide: sorted by a hash of ``start`` + row."""
    return rows[np.argsort(_mixed(rows.astype(np.uint64) + np.uint64(start)), kind="stable")]


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers whose bits look independent."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
