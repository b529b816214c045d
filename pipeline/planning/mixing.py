"""Which samples an epoch has and in which order: pure functions of dialogues, lengths, seed and epoch.

A *sample* is one appearance of a dialogue in an epoch. Its number is the number of the dialogue plus ``total`` times
the number of the repetition. So a dialogue that appears once has its own number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from framestream.pipeline.config.loading import BatchingConfig
from framestream.pipeline.planning import length_grouping as grouping

CHUNK = 1 << 18  #: numbers that are hashed or sorted at once, to bound memory


@dataclass(frozen=True, slots=True)
class EntryQuota:
    """Dialogues that appear equally often, and how many samples they have together in every epoch."""

    numbers: np.ndarray  #: int (n,) of dialogues, ascending
    num_samples: int

    def copies(self) -> int:
        """Return the largest number of samples that one of its dialogues has in an epoch."""
        return -(-self.num_samples // len(self.numbers)) if self.num_samples else 0


def draw_samples(quotas: Sequence[EntryQuota], total: int, seed: int, epoch: int) -> np.ndarray:
    """Return the samples of one epoch, ascending.

    With s samples of n dialogues, each dialogue has floor(s / n) samples, and s mod n of them have one more. These are
    the next ones, epoch by epoch, on a circle on which dialogues are ordered by a hash. So over epochs all dialogues
    appear equally often.

    Args:
        total: number of all dialogues, with those of no quota; dialogue numbers are below it.

    Returns:
        The dtype of the numbers of the quotas, or int64 where that is too small.
    """
    most = max((quota.copies() for quota in quotas), default=0)
    if len(quotas) == 1 and quotas[0].num_samples == len(quotas[0].numbers):
        return quotas[0].numbers
    fits_int32 = most * total <= np.iinfo(np.int32).max
    parts: list[np.ndarray] = [np.empty(0, dtype=np.int32 if fits_int32 else np.int64)]
    for quota in quotas:
        if not quota.num_samples:
            continue
        numbers = quota.numbers if fits_int32 else quota.numbers.astype(np.int64)
        full, rest = divmod(quota.num_samples, len(numbers))
        parts += [numbers + copy * total for copy in range(full)]
        if rest:
            circle = permute(numbers, epoch_seed(seed, "mix"))
            parts.append(np.roll(circle, -(epoch * rest % len(circle)))[:rest] + full * total)
    return np.sort(np.concatenate(parts))


def apportion(total: int, weights: Sequence[Fraction], limits: Sequence[int | None] | None = None) -> list[int]:
    """Split ``total`` into integer parts by weight, with the largest-remainder method; the first of equals wins.

    No part exceeds its limit. What a limit cuts off goes to the other parts, by their weights.

    Raises:
        ValueError: the limits leave no room for ``total``.
    """
    bounds = [total if limit is None else limit for limit in limits or [None] * len(weights)]
    parts = [0] * len(weights)
    active = [i for i, weight in enumerate(weights) if weight]
    while (left := total - sum(parts)) and active:
        exact = _exact_shares(left, weights, active)
        full = [i for i in active if exact[i] > bounds[i]]
        if not full:
            return _round_shares(parts, left, exact)
        for i in full:
            parts[i] = bounds[i]
        active = [i for i in active if i not in full]
    if left:
        raise ValueError(f"{total} requested, {total - left} available")
    return parts


def _exact_shares(total: int, weights: Sequence[Fraction], active: Sequence[int]) -> dict[int, Fraction]:
    """Split ``total`` among the parts ``active`` in exact proportion to their weights."""
    weight = sum((weights[i] for i in active), Fraction(0))
    return {i: total * weights[i] / weight for i in active}


def _round_shares(parts: Sequence[int], total: int, exact: dict[int, Fraction]) -> list[int]:
    """Give each part of ``exact`` its integer part, and one more to those with the largest remainders."""
    rounded = list(parts)
    for i, share in exact.items():
        rounded[i] = int(share)
    by_remainder = sorted(exact, key=lambda i: (int(exact[i]) - exact[i], i))
    for i in by_remainder[: total - sum(int(share) for share in exact.values())]:
        rounded[i] += 1
    return rounded


def epoch_order(rows: np.ndarray, lengths: np.ndarray, batching: BatchingConfig, seed: int, epoch: int) -> np.ndarray:
    """Put ``rows`` (numbers of samples, ascending) in the order of one epoch; see ``batching.order``.

    Only ``modality_length`` drops samples, the same number in every epoch.

    Args:
        lengths: int (n,), tokens of each sample, negative for text without media.
    """
    start = epoch_seed(seed, epoch)
    size, chunks = batching.global_batch, batching.row_multiple
    generator = torch.Generator().manual_seed(start)
    match batching.order:
        case "shuffle":
            return permute(rows, start)
        case "sequential":
            return rows
        case "long_together":
            return rows[grouping.long_together(np.abs(lengths), size, chunks, generator)]
        case "length":
            return rows[grouping.length_grouped(np.abs(lengths), size, chunks, generator)]
        case "length_windows":
            return rows[grouping.length_grouped_windows(np.abs(lengths), size, generator)]
        case "modality":
            return rows[grouping.modality_grouped(lengths, size, chunks, generator)]
        case _:  # modality_length
            return rows[grouping.modality_length_grouped(lengths, size, chunks, generator)]


def epoch_seed(seed: int, epoch: int | str) -> int:
    """Return the 64-bit number that decides the order of an epoch."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")


def permute(rows: np.ndarray, start: int) -> np.ndarray:
    """Permute ``rows`` by sorting them by a hash of ``start`` + row, which no random number library decides.

    The rows are sorted in parts, by ranges of the first byte of their hash. That needs less memory than one sort and
    gives the same order.
    """
    parts = max(1, min(256, len(rows) // CHUNK))
    first_byte = np.empty(len(rows), dtype=np.uint8)
    for offset in range(0, len(rows), CHUNK):
        chunk = slice(offset, offset + CHUNK)
        first_byte[chunk] = _splitmix64(rows[chunk].astype(np.uint64) + np.uint64(start)) >> np.uint64(56)
    out, done = np.empty_like(rows), 0
    edges = [part * 256 // parts for part in range(parts + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        members = rows[(first_byte >= low) & (first_byte <= high - 1)]
        hashes = _splitmix64(members.astype(np.uint64) + np.uint64(start))
        out[done : done + len(members)] = members[np.argsort(hashes, kind="stable")]
        done += len(members)
    return out


def _splitmix64(values: np.ndarray) -> np.ndarray:
    """Apply splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers whose bits look independent."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
