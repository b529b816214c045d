"""Orders of an epoch that group dialogues by kind and length: the published sampler's, for global batches.

Each takes ``lengths``, int (n,), n at least 1, and gives places in it, int64; slice k of ``size`` of them is global
batch k. Where kinds count, lengths are positive with media and negative for text. Within a global batch dialogues stand
as ``shares`` of about equal length, one after the other: the published code gives one share to each rank, here packing
deals them out anew. Randomness comes from the generators given alone, in the published order, so that equal seeds give
the published orders (``tests/golden/length_grouping``). The published training used :func:`modality`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

import numpy as np
import torch

WINDOW = 8  #: global batches that ``length_windows`` shuffles together
CHUNK = 50  #: global batches, at most, that ``length`` sorts together
CHUNKS = 4  #: chunks, at least, of an epoch that has as many global batches


def random_batches(lengths: np.ndarray, size: int, shares: int, generator: torch.Generator) -> np.ndarray:
    """A permutation, cut into global batches; lengths decide places within them alone."""
    batches = _slices(_permutation(len(lengths), generator), size)
    return _joined(_shared(batch, lengths, shares) for batch in batches)


def length_grouped(lengths: np.ndarray, size: int, shares: int, generator: torch.Generator) -> np.ndarray:
    """Global batches of like lengths: chunks of a permutation, each sorted, cut into global batches in random order.

    The first chunk's longest dialogue changes places with the longest of all.
    """
    chunk = size * max(1, min(len(lengths) // (size * CHUNKS), CHUNK))
    chunks = [_falling(part, lengths) for part in _slices(_permutation(len(lengths), generator), chunk)]
    longest = int(np.argmax([lengths[part[0]] for part in chunks]))
    chunks[0][0], chunks[longest][0] = chunks[longest][0], chunks[0][0]
    batches = [_shared(batch, lengths, shares) for batch in _slices(_joined(chunks), size)]
    return _joined(_shuffled(batches, generator))


def length_grouped_windows(lengths: np.ndarray, size: int, generator: torch.Generator) -> np.ndarray:
    """Global batches of like lengths: all sorted, shuffled within windows of 8, cut, in random order."""
    rank = _permutation(len(lengths), generator)
    windows = _slices(_falling(np.arange(len(lengths)), lengths), size * WINDOW)
    batches = _slices(_joined(_falling(window, rank) for window in windows), size)
    return _joined(_shuffled(batches, generator))


def modality_grouped(
    lengths: np.ndarray, size: int, shares: int, generator: torch.Generator, within: torch.Generator | None = None
) -> np.ndarray:
    """Global batches of one kind, :func:`plain` within each, in random order; what is left of both stands last.

    ``within`` draws the order within each kind where both are there; ``generator`` if not given. ValueError where a
    length is 0, which is of no kind.
    """
    return _by_kind(random_batches, lengths, size, shares, generator, within, keep_rest=True)


def modality_length_grouped(
    lengths: np.ndarray, size: int, shares: int, generator: torch.Generator, within: torch.Generator | None = None
) -> np.ndarray:
    """As :func:`modality`, with :func:`length` within each kind and without the last global batch of either.

    Where there is one kind alone, nothing is dropped. The order may be empty.
    """
    return _by_kind(length_grouped, lengths, size, shares, generator, within, keep_rest=False)


def split_by_length(places: np.ndarray, lengths: np.ndarray, chunks: int) -> list[np.ndarray]:
    """``places`` dealt out in order, each to the chunk of least total length with room, the first of equals.

    Where ``chunks`` does not divide their number, every ``chunks``-th goes to one chunk instead.
    """
    room, rest = divmod(len(places), chunks)
    if rest:
        return [places[start::chunks] for start in range(chunks)]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    least = [(0, chunk) for chunk in range(chunks)]
    for place, size in zip(places.tolist(), lengths[places].tolist(), strict=True):
        total, chunk = heapq.heappop(least)
        dealt[chunk].append(place)
        if len(dealt[chunk]) < room:
            heapq.heappush(least, (total + size, chunk))
    return [np.array(chunk, dtype=np.int64) for chunk in dealt]


def _by_kind(
    inner: Callable[[np.ndarray, int, int, torch.Generator], np.ndarray],
    lengths: np.ndarray,
    size: int,
    shares: int,
    generator: torch.Generator,
    within: torch.Generator | None,
    keep_rest: bool,
) -> np.ndarray:
    if not lengths.all():
        raise ValueError(f"the length at place {int(np.flatnonzero(lengths == 0)[0])} is 0, neither media nor text")
    media, text = np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)
    if not len(media) or not len(text):
        return inner(lengths, size, shares, generator)
    kinds = [
        _slices(places[inner(np.abs(lengths[places]), size, shares, within or generator)], size)
        for places in (media, text)
    ]
    batches = _shuffled([batch for kind in kinds for batch in kind[:-1]], generator)
    rest = [np.sort(np.concatenate([kind[-1] for kind in kinds]))] if keep_rest else []
    return _joined([*batches, *rest])


def _shared(batch: np.ndarray, lengths: np.ndarray, shares: int) -> np.ndarray:
    return np.concatenate(split_by_length(_falling(batch, lengths), lengths, shares))


def _falling(places: np.ndarray, by: np.ndarray) -> np.ndarray:
    """``places`` by falling value, equals in the order they had."""
    return places[np.argsort(-by[places], kind="stable")]


def _permutation(count: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(count, generator=generator).numpy()


def _shuffled(batches: list[np.ndarray], generator: torch.Generator) -> list[np.ndarray]:
    return [batches[i] for i in _permutation(len(batches), generator)]


def _slices(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[start : start + size] for start in range(0, len(places), size)]


def _joined(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
