"""Attention within the segments of a packed sequence: clips and tiles in the tower, dialogues in the language model.

One function with three implementations, and none builds a mask over the full sequence. On NVIDIA GPUs in 16 bit it is
one call of a variable-length kernel: torch's own, or else that of flash-attn. Elsewhere, every run of equally long
segments is one batched ``scaled_dot_product_attention`` call (SDPA).

Shapes: T tokens of all segments, H query heads, K key and value heads (K divides H), D channels of a head.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from framestream.trainer.model.dense_attention import attend_dense, is_faster

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]
try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

MIN_CAPABILITY = (8, 0)  #: of GPUs that the variable-length kernels run on: A100 and newer
MAX_HEAD_SIZE = 256  #: of these kernels; a multiple of 8


@dataclass(frozen=True)
class AttentionSegments:
    """How T tokens divide into segments that see only themselves.

    ``runs`` are (count, length) pairs of Python ints: consecutive segments of one length are one pair.
    ``cu_seqlens`` is int32 (segments + 1,) on the tokens' device. Neither building nor using them waits for the device.
    """

    runs: tuple[tuple[int, int], ...]
    cu_seqlens: torch.Tensor

    @classmethod
    def of_runs(cls, runs: list[tuple[int, int]], device: torch.device) -> AttentionSegments:
        """Build segments from (count, length) pairs; empty ones are dropped."""
        filled = tuple((count, length) for count, length in runs if count and length)
        ends, start = [torch.zeros(1, dtype=torch.int32, device=device)], 0
        for count, length in filled:
            stop = start + count * length
            # made on the device: a copy from the host would wait for all that the device still has to do
            ends.append(torch.arange(start + length, stop + 1, length, dtype=torch.int32, device=device))
            start = stop
        return cls(filled, torch.cat(ends))

    @classmethod
    def of_lengths(cls, lengths: list[int], cu_seqlens: torch.Tensor) -> AttentionSegments:
        """Build segments from their lengths, and from the same lengths added up on the device."""
        runs = tuple((len(list(same)), length) for length, same in itertools.groupby(lengths) if length)
        return cls(runs, cu_seqlens)

    @property
    def longest(self) -> int:
        """Length of the longest segment."""
        return max(length for _, length in self.runs)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: AttentionSegments, causal: bool
) -> torch.Tensor:
    """Compute softmax attention of each token to its own segment, scaled by 1/sqrt(D).

    Args:
        q: (T, H, D).
        k, v: (T, K, D).
        causal: a token sees only itself and the tokens before it in its segment.

    Returns:
        (T, H, D)
    """
    return select_kernel(q.device.type, q.dtype, q.shape[-1]).attend(q, k, v, segments, causal)


def attend_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: AttentionSegments, causal: bool
) -> torch.Tensor:
    """Compute ``attend`` by ``scaled_dot_product_attention``: one batched call for each run of equal lengths.

    Short segments on a CPU are products of matrices where these are faster.
    """
    if is_faster(q, segments.longest):
        return attend_dense(q, k, v, segments.runs, causal)
    outputs, start = [], 0
    for count, length in segments.runs:
        end = start + count * length
        q_run, k_run, v_run = (
            x[start:end].unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v)
        )  # (count, heads, length, D)
        out = F.scaled_dot_product_attention(
            q_run, k_run, v_run, is_causal=causal, enable_gqa=q_run.shape[1] != k_run.shape[1]
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


@dataclass(frozen=True)
class AttentionKernel:
    """An implementation of :func:`attend`, and its name for the log."""

    name: str
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, AttentionSegments, bool], torch.Tensor]


@functools.cache
def select_kernel(device: str, dtype: torch.dtype, head_size: int) -> AttentionKernel:
    """Select the implementation for tensors on a type of device, such as ``cuda``."""

    def sdpa(reason: str) -> AttentionKernel:
        return AttentionKernel(
            f"SDPA for each run of equal lengths, or batched products where these are faster ({reason})", attend_sdpa
        )

    if device != "cuda":
        return sdpa(f"the device is {device}")
    if dtype not in (torch.float16, torch.bfloat16):
        return sdpa(f"the variable-length kernels have no {dtype}; train.dtype: bf16 is faster")
    if torch.cuda.get_device_capability() < MIN_CAPABILITY:
        return sdpa("the variable-length kernels need an A100 or a newer GPU")
    if head_size % 8 or head_size > MAX_HEAD_SIZE:
        return sdpa(f"the variable-length kernels have no heads of {head_size} channels")
    if varlen_attn is not None and torch.backends.cuda.is_flash_attention_available():
        return AttentionKernel("torch.nn.attention.varlen", varlen_kernel(varlen_attn))
    if flash_attn_varlen_func is not None:
        return AttentionKernel("flash-attn", flash_kernel(flash_attn_varlen_func))
    return sdpa(
        f"torch {torch.__version__} has no variable-length kernel and flash-attn is not installed; "
        "install torch 2.10 or newer, or the extra flash"
    )


def describe_kernels(device: str, dtype: torch.dtype, head_sizes: Mapping[str, int]) -> str:
    """Name the implementation that each part of a model uses, in one line; ``head_sizes``: channels of a head."""
    names = {part: select_kernel(device, dtype, size).name for part, size in head_sizes.items()}
    if len(set(names.values())) == 1:
        return f"attention by {next(iter(names.values()))}"
    return "attention: " + "; ".join(f"{part} by {name}" for part, name in names.items())


def varlen_kernel(function: Callable[..., Any]) -> Callable[..., torch.Tensor]:
    """Adapt ``torch.nn.attention.varlen.varlen_attn``, whose keywords depend on torch's version."""
    known = inspect.signature(function).parameters

    def attend_varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: AttentionSegments, causal: bool
    ) -> torch.Tensor:
        ends, longest = segments.cu_seqlens, segments.longest
        keywords: dict[str, Any] = {}
        if causal:
            keywords |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if q.shape[1] != k.shape[1]:
            if "enable_gqa" in known:
                keywords["enable_gqa"] = True
            else:
                k, v = (_repeat_heads(x, q.shape[1] // k.shape[1]) for x in (k, v))
        return function(q, k, v, ends, ends, longest, longest, **keywords)

    return attend_varlen


def flash_kernel(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Adapt ``flash_attn.flash_attn_varlen_func``."""

    def attend_flash(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: AttentionSegments, causal: bool
    ) -> torch.Tensor:
        ends, longest = segments.cu_seqlens, segments.longest
        return function(q, k, v, ends, ends, longest, longest, causal=causal)

    return attend_flash


def _repeat_heads(x: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each key or value head for the query heads that share it: (T, K, D) -> (T, times K, D)."""
    return x.unsqueeze(2).expand(-1, -1, times, -1).flatten(1, 2)
