"""Attention within short segments as batched products of matrices, for CPUs.

``scaled_dot_product_attention`` on a CPU walks over small blocks, and calls a product of MKL for each. On a processor
with AVX-512 whole segments are faster, if oneDNN computes the products (``train.matmul_precision: medium``): MKL does
not use AVX-512 on AMD.

Causal segments of similar lengths are padded to one batch: with the padding at their ends, no token sees it.

The weights of a segment are L x L values, so longer segments stay with the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

LONGEST = 1024  #: tokens of a segment
PADDED = 1.5  #: most times that a causal segment is padded to
CHUNK = 2**19  #: attention weights that are computed together: they fit a core's cache
SAVED = 2**24  #: attention weights of one call that are kept for the backward pass; more are computed again

#: segments computed together: the first token of each, and their lengths
Group = tuple[tuple[int, ...], tuple[int, ...]]


def is_faster(x: torch.Tensor, longest: int) -> bool:
    """Return whether segments of at most ``longest`` tokens of ``x`` are faster as products of matrices."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or longest > LONGEST:
        return False
    return torch.get_float32_matmul_precision() == "medium" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def attend_dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, runs: Sequence[tuple[int, int]], causal: bool
) -> torch.Tensor:
    """Compute softmax attention of each token to its own segment, scaled by 1/sqrt(D).

    Args:
        q: (T, H, D).
        k, v: (T, K, D); H is a multiple of K.
        runs: (count, length) of consecutive segments of one length, T tokens in all.
        causal: a token sees only itself and the tokens before it in its segment.

    Returns:
        (T, H, D)
    """
    return _Attention.apply(q, k, v, tuple(group_segments(runs, causal)), causal)


def group_segments(runs: Sequence[tuple[int, int]], causal: bool) -> Iterator[Group]:
    """Divide segments into groups of equal lengths, of similar ones if ``causal``: shortest first."""
    segments, start = [], 0
    for count, length in runs:
        segments += [(length, start + i * length) for i in range(count)]
        start += count * length
    group: list[tuple[int, int]] = []
    for segment in sorted(segments):
        if group and segment[0] > group[0][0] * (PADDED if causal else 1):
            yield tuple(start for _, start in group), tuple(length for length, _ in group)
            group = []
        group.append(segment)
    if group:
        yield tuple(start for _, start in group), tuple(length for length, _ in group)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: tuple[Group, ...], causal: bool
    ) -> torch.Tensor:
        output, saved = torch.empty_like(q), []
        size = sum(len(lengths) * max(lengths) ** 2 for _, lengths in groups)
        save = any(ctx.needs_input_grad) and size * q.shape[1] <= SAVED
        for group in groups:
            q_rows, k_rows, v_rows = _gather(q, group, k.shape[1]), _gather(k, group), _gather(v, group)
            out = torch.empty_like(q_rows)
            for part in _chunks(q_rows, k_rows):
                weights = _weights(q_rows[part], k_rows[part], causal)
                torch.bmm(weights, v_rows[part], out=out[part])
                if save:
                    saved.append(weights)
            _scatter(out, output, group)
        ctx.save_for_backward(q, k, v, *saved)
        ctx.groups, ctx.causal = groups, causal
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, *saved = ctx.saved_tensors
        gradients, kept = [torch.empty_like(x) for x in (q, k, v)], iter(saved)
        for group in ctx.groups:
            q_rows, k_rows, v_rows = _gather(q, group, k.shape[1]), _gather(k, group), _gather(v, group)
            out = _gather(gradient, group, k.shape[1])
            changes = [torch.empty_like(x) for x in (q_rows, k_rows, v_rows)]
            for part in _chunks(q_rows, k_rows):
                weights = next(kept) if saved else _weights(q_rows[part], k_rows[part], ctx.causal)
                torch.bmm(weights.mT, out[part], out=changes[2][part])
                change = torch.bmm(out[part], v_rows[part].mT)
                change = torch._softmax_backward_data(change, weights, -1, change.dtype).mul_(q.shape[-1] ** -0.5)
                torch.bmm(change, k_rows[part], out=changes[0][part])
                torch.bmm(change.mT, q_rows[part], out=changes[1][part])
            for rows, total in zip(changes, gradients, strict=True):
                _scatter(rows, total, group)
        return *gradients, None, None


def _gather(x: torch.Tensor, group: Group, heads: int | None = None) -> torch.Tensor:
    """Copy the segments of ``x`` (T, H, D), padded with zeros: (n heads, H / heads L, D); all H heads if None."""
    starts, lengths = group
    longest, heads = max(lengths), heads or x.shape[1]
    padded = x.new_zeros if min(lengths) < longest else x.new_empty
    rows = padded(len(starts), heads, x.shape[1] // heads, longest, x.shape[2])
    for row, start, length in zip(rows, starts, lengths, strict=True):
        row[:, :, :length] = x[start : start + length].unflatten(1, (heads, -1)).movedim(0, 2)
    return rows.flatten(2, 3).flatten(0, 1)


def _scatter(rows: torch.Tensor, x: torch.Tensor, group: Group) -> None:
    """Copy what :func:`_gather` returned to ``x``, without the padding."""
    starts, lengths = group
    rows = rows.view(len(starts), x.shape[1], -1, x.shape[2])
    for row, start, length in zip(rows, starts, lengths, strict=True):
        x[start : start + length] = row[:, :length].movedim(0, 1)


def _chunks(q: torch.Tensor, k: torch.Tensor) -> Iterator[slice]:
    size = max(1, CHUNK // (q.shape[1] * k.shape[1]))
    return (slice(start, start + size) for start in range(0, len(q), size))


def _weights(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """Compute the attention weights (n, times L, L) of ``q`` (n, times L, D) and ``k`` (n, L, D)."""
    scores = torch.bmm(q, k.mT).mul_(q.shape[-1] ** -0.5)
    if causal:
        length = k.shape[1]
        hidden = torch.full((length, length), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
        scores.view(len(q), -1, length, length).add_(hidden)
    return scores.softmax(-1)
