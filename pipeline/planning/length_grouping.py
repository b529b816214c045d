"""Epoch orders that group dialogues by modality and length, for global batches: the published sampler's, and our own.

Each function takes ``lengths``, int (n,) with n at least 1, and returns indices into it, int64. Slice k of ``size``
indices is global batch k. Where the modality matters, lengths are positive for dialogues with media and negative for
text. Within a global batch, dialogues stand as ``chunks`` of similar total length, one after the other. The published
code gives one chunk to each rank; here packing distributes them differently.

Random numbers come only from the given generators, in the published order. So equal seeds give the published orders
(``tests/golden/length_grouping``). The published training used :func:`modality_grouped`. :func:`long_together` is ours.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable

import numpy as np
import torch

WINDOW = 8  #: global batches that ``length_windows`` shuffles together
CHUNK = 50  #: most global batches that ``length`` sorts together
CHUNKS = 4  #: fewest groups of an epoch that ``length`` sorts separately, if the epoch has as many global batches


def random_batches(lengths: np.ndarray, size: int, chunks: int, generator: torch.Generator) -> np.ndarray:
    """Cut a permutation into global batches; lengths only decide the positions within them."""
    batches = _slices(_permutation(len(lengths), generator), size)
    return _join(_chunked(batch, lengths, chunks) for batch in batches)


def long_together(lengths: np.ndarray, size: int, chunks: int, generator: torch.Generator) -> np.ndarray:
    """Cut a permutation into global batches, then exchange dialogues so that long ones of similar length meet.

    Long is a dialogue longer than the mean row, where a global batch has ``chunks`` rows: all ranks wait for the one
    that runs it. Sorted by length, long dialogues are taken ``chunks`` at a time, each such group into a global batch
    of its own, which is drawn. The other dialogues fill the global batches at random. So most batches have either no
    long dialogue or one for each row, beside dialogues of all lengths.
    """
    order = _permutation(len(lengths), generator)
    whole, width = len(lengths) // size, min(chunks, size)
    long = order[lengths[order].astype(np.int64) * chunks * len(lengths) > int(lengths.sum()) * size]
    groups = _slices(_sort_descending(long, lengths), width)[:whole]
    hosts = dict(zip(_permutation(whole, generator).tolist(), groups, strict=False))
    others = order[~np.isin(order, _join(groups))]
    batches, used = [], 0
    for batch in range(-(-len(lengths) // size)):
        group = hosts.get(batch, others[:0])
        filled = others[used : used + size - len(group)]
        used += len(filled)
        batches.append(_chunked(np.concatenate([group, filled]), lengths, chunks))
    return _join(batches)


def length_grouped(lengths: np.ndarray, size: int, chunks: int, generator: torch.Generator) -> np.ndarray:
    """Group global batches by length: sort parts of a permutation, cut them into batches, and shuffle the batches.

    The longest dialogue of the first part and the longest of all swap positions.
    """
    part_size = size * max(1, min(len(lengths) // (size * CHUNKS), CHUNK))
    parts = [_sort_descending(part, lengths) for part in _slices(_permutation(len(lengths), generator), part_size)]
    longest = int(np.argmax([lengths[part[0]] for part in parts]))
    parts[0][0], parts[longest][0] = parts[longest][0], parts[0][0]
    batches = [_chunked(batch, lengths, chunks) for batch in _slices(_join(parts), size)]
    return _join(_shuffle(batches, generator))


def length_grouped_windows(lengths: np.ndarray, size: int, generator: torch.Generator) -> np.ndarray:
    """Group global batches by length: sort all, shuffle within windows of 8 batches, cut, and shuffle the batches."""
    rank = _permutation(len(lengths), generator)
    windows = _slices(_sort_descending(np.arange(len(lengths)), lengths), size * WINDOW)
    batches = _slices(_join(_sort_descending(window, rank) for window in windows), size)
    return _join(_shuffle(batches, generator))


def modality_grouped(
    lengths: np.ndarray, size: int, chunks: int, generator: torch.Generator, within: torch.Generator | None = None
) -> np.ndarray:
    """Make global batches of one modality, each as in :func:`random_batches`, in random order.

    The incomplete last batches of both modalities come at the end.

    Args:
        within: draws the order within each modality if both are present; ``generator`` if not given.

    Raises:
        ValueError: a length is 0, which belongs to no modality.
    """
    return _group_by_modality(random_batches, lengths, size, chunks, generator, within, keep_rest=True)


def modality_length_grouped(
    lengths: np.ndarray, size: int, chunks: int, generator: torch.Generator, within: torch.Generator | None = None
) -> np.ndarray:
    """Make global batches of one modality as :func:`modality_grouped`, each as in :func:`length_grouped`.

    The last global batch of each modality is dropped. If there is only one modality, nothing is dropped. The order may
    be empty.
    """
    return _group_by_modality(length_grouped, lengths, size, chunks, generator, within, keep_rest=False)


def split_by_length(indices: np.ndarray, lengths: np.ndarray, chunks: int) -> list[np.ndarray]:
    """Distribute ``indices`` in order, each to the chunk of least total length with room; the first of equals wins.

    If ``chunks`` does not divide their number, every ``chunks``-th index goes to the same chunk instead.
    """
    room, rest = divmod(len(indices), chunks)
    if rest:
        return [indices[start::chunks] for start in range(chunks)]
    members: list[list[int]] = [[] for _ in range(chunks)]
    heap = [(0, chunk) for chunk in range(chunks)]
    for index, length in zip(indices.tolist(), lengths[indices].tolist(), strict=True):
        total, chunk = heapq.heappop(heap)
        members[chunk].append(index)
        if len(members[chunk]) < room:
            heapq.heappush(heap, (total + length, chunk))
    return [np.array(chunk, dtype=np.int64) for chunk in members]


def _group_by_modality(
    order: Callable[[np.ndarray, int, int, torch.Generator], np.ndarray],
    lengths: np.ndarray,
    size: int,
    chunks: int,
    generator: torch.Generator,
    within: torch.Generator | None,
    keep_rest: bool,
) -> np.ndarray:
    if not lengths.all():
        raise ValueError(f"the length at index {int(np.flatnonzero(lengths == 0)[0])} is 0, neither media nor text")
    media, text = np.flatnonzero(lengths > 0), np.flatnonzero(lengths < 0)
    if not len(media) or not len(text):
        return order(lengths, size, chunks, generator)
    modalities = [
        _slices(indices[order(np.abs(lengths[indices]), size, chunks, within or generator)], size)
        for indices in (media, text)
    ]
    batches = _shuffle([batch for modality in modalities for batch in modality[:-1]], generator)
    rest = [np.sort(np.concatenate([modality[-1] for modality in modalities]))] if keep_rest else []
    return _join([*batches, *rest])


def _chunked(batch: np.ndarray, lengths: np.ndarray, chunks: int) -> np.ndarray:
    return np.concatenate(split_by_length(_sort_descending(batch, lengths), lengths, chunks))


def _sort_descending(indices: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Sort ``indices`` by descending value in ``by``; equals stay in their order."""
    return indices[np.argsort(-by[indices], kind="stable")]


def _permutation(count: int, generator: torch.Generator) -> np.ndarray:
    return torch.randperm(count, generator=generator).numpy()


def _shuffle(batches: list[np.ndarray], generator: torch.Generator) -> list[np.ndarray]:
    return [batches[i] for i in _permutation(len(batches), generator)]


def _slices(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _join(parts: Iterable[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
