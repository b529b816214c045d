"""What is in an epoch and in which order: pure functions of the dialogues, their lengths, the seed and the epoch.

An *appearance* is one place of a dialogue in an epoch. Its number is that of the dialogue plus ``total`` times the
number of the copy, so that what appears once has the dialogue's own number.
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
    """Dialogues that appear equally often, and how many appearances they have together in every epoch."""

    numbers: np.ndarray  #: int (n,) of dialogues, ascending
    num_samples: int

    def copies(self) -> int:
        """The most appearances that one of its dialogues has in an epoch."""
        return -(-self.num_samples // len(self.numbers)) if self.num_samples else 0


def draw_samples(shares: Sequence[EntryQuota], total: int, seed: int, epoch: int) -> np.ndarray:
    """The appearances of one epoch, ascending; of the dtype of the shares' numbers, or int64 where that is too small.

    With a appearances of n dialogues each has floor(a / n), and a mod n of them one more: the next ones, epoch by
    epoch, of a circle in which they stand by a hash. So over epochs all appear equally often.

    Args:
        total: dialogues of all shares and others; numbers are below it.
    """
    most = max((share.copies() for share in shares), default=0)
    if len(shares) == 1 and shares[0].num_samples == len(shares[0].numbers):
        return shares[0].numbers
    small = most * total <= np.iinfo(np.int32).max
    parts = [np.empty(0, dtype=np.int32 if small else np.int64)]
    for share in filter(lambda share: share.num_samples, shares):
        numbers = share.numbers if small else share.numbers.astype(np.int64)
        whole, rest = divmod(share.num_samples, len(numbers))
        parts += [numbers + copy * total for copy in range(whole)]
        if rest:
            circle = permute(numbers, epoch_seed(seed, "mix"))
            parts.append(np.roll(circle, -(epoch * rest % len(circle)))[:rest] + whole * total)
    return np.sort(np.concatenate(parts))


def apportion(total: int, weights: Sequence[Fraction], limits: Sequence[int | None] | None = None) -> list[int]:
    """``total`` in whole parts by weight: largest remainders (the first of equals), none above its limit.

    What a limit keeps from one goes to the others, by their weights. ValueError where the limits leave no room.
    """
    limits = limits or [None] * len(weights)
    parts, open_ = [0] * len(weights), [place for place, weight in enumerate(weights) if weight]
    while True:
        left, whole = total - sum(parts), sum(weights[place] for place in open_)
        if not left:
            return parts
        if not open_:
            raise ValueError(f"{total} are wanted and {sum(parts)} can be had")
        exact = {place: left * weights[place] / whole for place in open_}
        full = [place for place in open_ if limits[place] is not None and exact[place] > limits[place]]
        if not full:
            break
        for place in full:
            parts[place] = limits[place]
        open_ = [place for place in open_ if place not in full]
    for place in open_:
        parts[place] = int(exact[place])
    remainders = sorted(open_, key=lambda place: (int(exact[place]) - exact[place], place))
    for place in remainders[: total - sum(parts)]:
        parts[place] += 1
    return parts


def epoch_order(rows: np.ndarray, lengths: np.ndarray, batching: BatchingConfig, seed: int, epoch: int) -> np.ndarray:
    """``rows`` (numbers of appearances, ascending) in the order of one epoch, same dtype; see ``batching.order``.

    ``modality_length`` alone leaves some out, as many in every epoch.

    Args:
        lengths: int (n,), tokens of each appearance, negative for text without media.
    """
    start = epoch_seed(seed, epoch)
    size, shares = batching.global_batch, batching.row_multiple
    generator = torch.Generator().manual_seed(start)
    match batching.order:
        case "shuffle":
            return permute(rows, start)
        case "sequential":
            return rows
        case "length":
            return rows[grouping.length_grouped(np.abs(lengths), size, shares, generator)]
        case "length_windows":
            return rows[grouping.length_grouped_windows(np.abs(lengths), size, generator)]
        case "modality":
            return rows[grouping.modality_grouped(lengths, size, shares, generator)]
        case _:  # modality_length
            return rows[grouping.modality_length_grouped(lengths, size, shares, generator)]


def epoch_seed(seed: int, epoch: int | str) -> int:
    """The 64-bit number that all of an epoch's order comes from."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{epoch}".encode()).digest()[:8], "little")


def permute(rows: np.ndarray, start: int) -> np.ndarray:
    """A permutation of ``rows`` that no library's random numbers decide: sorted by a hash of ``start`` + row."""
    parts = max(1, min(256, len(rows) // CHUNK))  # by their hash's first byte, so that little is held at once
    first = np.empty(len(rows), dtype=np.uint8)
    for place in range(0, len(rows), CHUNK):
        part = slice(place, place + CHUNK)
        first[part] = _mixed(rows[part].astype(np.uint64) + np.uint64(start)) >> np.uint64(56)
    out, done = np.empty_like(rows), 0
    edges = [part * 256 // parts for part in range(parts + 1)]
    for low, high in zip(edges, edges[1:], strict=False):
        part = rows[(first >= low) & (first <= high - 1)]
        hashes = _mixed(part.astype(np.uint64) + np.uint64(start))
        out[done : done + len(part)] = part[np.argsort(hashes, kind="stable")]
        done += len(part)
    return out


def _mixed(values: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit numbers whose bits look independent."""
    with np.errstate(over="ignore"):
        values = values * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
