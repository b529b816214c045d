"""Greedy generation for many prompts at once.

Prompts are read as rows, exactly as in training: packed, without padding or masks over whole sequences. Only then are
their keys and values laid side by side, padded on the left, and the answers grow together one token at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from pipeline.batch import Batch
from trainer.model.video_llm import VideoLLM


@torch.no_grad()
def generate(
    model: VideoLLM, prompts: Sequence[Batch], max_new_tokens: int, stop: int | Collection[int]
) -> list[list[int]]:
    """Continue every dialogue of every row with its most likely tokens.

    Args:
        model: in eval mode, on the prompts' device.
        prompts: rows of one or more prompts each; their labels and weights are not used.
        max_new_tokens: longest answer.
        stop: id or ids that end an answer.

    Returns:
        Token ids of each answer without the one that ended it, in the order of the prompts.
    """
    stop = {stop} if isinstance(stop, int) else set(stop)
    cache, lengths, logits = prefill(model, prompts)
    device, longest = logits.device, max(lengths)
    length = torch.tensor(lengths, device=device)
    # (B, longest + max_new_tokens): which cached places hold a token of the dialogue rather than padding
    present = torch.arange(longest + max_new_tokens, device=device) >= (longest - length).unsqueeze(1)
    answers: list[list[int]] = [[] for _ in lengths]
    growing = [True] * len(lengths)
    for new in range(max_new_tokens):
        tokens = logits.argmax(-1)  # (B,)
        for i, token in enumerate(tokens.tolist()):
            growing[i] = growing[i] and token not in stop
            if growing[i]:
                answers[i].append(token)
        if not any(growing) or new + 1 == max_new_tokens:
            break
        hidden = model.language_model.model(
            inputs_embeds=model.language_model.model.embed_tokens(tokens).unsqueeze(1),
            attention_mask={"full_attention": present[:, None, None, : longest + new + 1]},
            position_ids=(length + new).unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.language_model.lm_head(hidden[:, 0])
    return answers


def prefill(model: VideoLLM, prompts: Sequence[Batch]) -> tuple[DynamicCache, list[int], torch.Tensor]:
    """Run the prompts' rows one after the other.

    Returns:
        the cache of all B dialogues, keys and values (B, heads, longest, D) padded on the left with zeros; the number
        of tokens of each dialogue; the logits (B, V) of each dialogue's next token.
    """
    lengths: list[int] = []
    logits: list[torch.Tensor] = []
    layers: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for row in prompts:
        cache = DynamicCache(config=model.language_model.config)
        hidden = model.hidden(row, cache)
        logits.append(model.language_model.lm_head(hidden[row.cu_seqlens[1:].long() - 1]))
        sizes = row.cu_seqlens.diff().tolist()
        lengths += sizes
        layers = layers or [([], []) for _ in cache.layers]
        for (keys, values), layer in zip(layers, cache.layers, strict=True):
            keys += layer.keys.squeeze(0).split(sizes, dim=1)  # each (heads, length, D)
            values += layer.values.squeeze(0).split(sizes, dim=1)
    joined = DynamicCache(config=model.language_model.config)
    for n, (keys, values) in enumerate(layers):
        joined.update(_pad_left(keys, max(lengths)), _pad_left(values, max(lengths)), n)
    return joined, lengths, torch.cat(logits)


def _pad_left(states: list[torch.Tensor], length: int) -> torch.Tensor:
    """(heads, l, D) tensors of different l -> (B, heads, length, D)."""
    return torch.stack([F.pad(state, (0, 0, length - state.shape[1], 0)) for state in states])
