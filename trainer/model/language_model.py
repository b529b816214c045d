"""Qwen2 on packed rows: attention within each dialogue, and a last layer that is computed only where it is read.

The loss reads the labelled positions, and generation reads the last one of each dialogue. The layers before must be
computed everywhere, since every position is a key and a value of the next layer. The last layer's feed-forward network
and, on a CPU, its queries are not needed elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from framestream.pipeline.config.model import LanguageModelConfig
from framestream.trainer.model import attention
from framestream.trainer.model.attention import AttentionSegments, attend_sdpa
from framestream.trainer.model.lm_head import ChunkedLMHead

MIN_SELECTED_LENGTH = 1024  #: of a segment in which ``attend_needed`` selects queries: shorter ones are batched
MAX_SELECTED = 1 / 8  #: share of a segment's queries that are selected: their mask is a table of these and all keys
PACKED = "framestream_packed"  #: name under which transformers finds ``language_model_attention``


def build_language_model(cfg: LanguageModelConfig) -> Qwen2ForCausalLM:
    """Build Qwen2 with packed attention and the chunked loss head; weights are not initialized."""
    config = Qwen2Config(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=cfg.tie_word_embeddings,
        attn_implementation=PACKED,  # type: ignore[call-arg]  # taken by the base class as one of its **kwargs
    )
    with no_init_weights():
        model = Qwen2ForCausalLM(config)
    model.lm_head = ChunkedLMHead(model.model.embed_tokens if cfg.tie_word_embeddings else model.lm_head)
    model.model.layers[-1].__class__ = LastLayer
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.__class__ = RowLinear
    # Recomputed in numpy: inside DeepSpeed's zero.Init torch has computed the frequencies in 16 bit.
    width = cfg.hidden_size // cfg.num_attention_heads
    exponent = torch.from_numpy(np.arange(0, width, 2, dtype=np.float32)) / width
    rotary = model.model.rotary_emb
    rotary.inv_freq, rotary.original_inv_freq = 1.0 / cfg.rope_theta**exponent, 1.0 / cfg.rope_theta**exponent
    return model


class LastLayer(Qwen2DecoderLayer):
    """Qwen2's layer with ``needed``: int64 (K,), ascending positions of the row whose output is read; None for all.

    The output is (1, K, H) of an input (1, L, H). The keys and values of all positions go into a cache.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, needed: torch.Tensor | None = None, **settings: Any
    ) -> torch.Tensor:
        if needed is None:
            return super().forward(hidden_states, *args, **settings)
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attn(normed, *args, queries=needed, **settings)[0]
        hidden_states = hidden_states.index_select(1, needed) + attended.index_select(1, needed)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class RowLinear(nn.Linear):
    """A linear layer over rows (..., C), computed on (rows, C).

    Under ZeRO-3, DeepSpeed replaces ``F.linear``. Its own adds a bias inside the product for two dimensions only.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


def language_model_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    segments: AttentionSegments | None = None,
    queries: torch.Tensor | None = None,
    **settings,
):
    """Implement transformers' attention interface: packed rows by ``attend``, anything else by its own SDPA.

    Args:
        query: (1, H, T, D); key, value: (1, K, T, D) of a packed row when ``segments`` is given.
        queries: int64 (N,), ascending positions whose output is read, given with ``segments``; None for all.

    Returns:
        ((1, T, H, D), None)
    """
    if segments is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    kernel = attention.select_kernel(q.device.type, q.dtype, q.shape[-1])
    # The kernels of GPUs align other numbers of queries in their own ways; there, looking at positions would wait, too.
    if queries is not None and q.device.type == "cpu" and kernel.attend is attend_sdpa:
        return attend_needed(q, k, v, segments, queries).unsqueeze(0), None
    return kernel.attend(q, k, v, segments, True).unsqueeze(0), None


def attend_needed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, segments: AttentionSegments, needed: torch.Tensor
) -> torch.Tensor:
    """Compute causal ``attend`` at needed positions on a CPU; elsewhere the output may be zeros.

    In long segments only the needed queries are computed, if they are few.

    Args:
        needed: int64 (N,), ascending positions of queries.
    """
    if segments.longest < MIN_SELECTED_LENGTH:
        return attend_sdpa(q, k, v, segments, causal=True)
    outputs, start = [], 0
    for length in (length for count, length in segments.runs for _ in range(count)):
        end = start + length
        q_own, k_own, v_own = q[start:end], k[start:end], v[start:end]
        first, last = torch.searchsorted(needed, torch.tensor([start, end])).tolist()
        own = needed[first:last] - start if last > first else needed.new_zeros(1)  # so every input has its gradient
        if length < MIN_SELECTED_LENGTH or len(own) > length * MAX_SELECTED:
            alone = AttentionSegments(((1, length),), segments.cu_seqlens)
            outputs.append(attend_sdpa(q_own, k_own, v_own, alone, causal=True))
        else:
            q_few, k_all, v_all = (x.transpose(0, 1).unsqueeze(0) for x in (q_own[own], k_own, v_own))
            seen = torch.arange(length) <= own.unsqueeze(1)  # (N, length)
            few = F.scaled_dot_product_attention(
                q_few, k_all, v_all, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(torch.zeros_like(q_own).index_copy(0, own, few.squeeze(0).transpose(0, 1)))
        start = end
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


# No mask function is registered under this name, so transformers builds no mask for it. Exports that load by themselves
# have a copy of attention.py, which must not register a function in this one's place.
AttentionInterface.register(PACKED, language_model_attention)
