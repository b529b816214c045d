"""Attention within the segments of a packed sequence: clips and tiles in the tower, dialogues in the language model.

One function with two implementations. On CUDA in 16 bit, flash-attn's variable-length kernel runs if it is installed.
Elsewhere, every run of equally long segments is one batched ``scaled_dot_product_attention`` call. Neither builds a
mask over the full sequence.

Shapes: T tokens of all segments, H query heads, K key and value heads (K divides H), D channels of a head.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

PACKED = "framestream_packed"  #: name under which transformers finds ``language_model_attention``


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
    if flash_attn_varlen_func is not None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16):
        ends, longest = segments.cu_seqlens, segments.longest
        return flash_attn_varlen_func(q, k, v, ends, ends, longest, longest, causal=causal)
    return attend_sdpa(q, k, v, segments, causal)


def attend_sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: AttentionSegments, causal: bool
) -> torch.Tensor:
    """Compute ``attend`` by ``scaled_dot_product_attention``: one batched call for each run of equal lengths."""
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


def language_model_attention(
    module, query, key, value, attention_mask, segments: AttentionSegments | None = None, **settings
):
    """Implement transformers' attention interface: packed rows by ``attend``, anything else by its own SDPA.

    Args:
        query: (1, H, T, D); key, value: (1, K, T, D) of a packed row when ``segments`` is given.

    Returns:
        ((1, T, H, D), None)
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, segments, causal=True).unsqueeze(0), None


# No mask function is registered under this name, so transformers builds no mask for it.
AttentionInterface.register(PACKED, language_model_attention)
