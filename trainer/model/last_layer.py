"""The language model's last layer, which is computed only where its output is read.

The loss reads the labelled positions, and generation reads the last one of each dialogue. The layers before must be
computed everywhere, since every position is a key and a value of the next layer. The last layer's feed-forward network
and, on a CPU, its queries are not needed elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer


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
