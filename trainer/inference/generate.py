"""Generation for many prompts at once, greedy or sampled.

Prompts are read as rows, exactly as in training: packed, without padding or masks over whole sequences. Only then are
their keys and values laid side by side, padded on the left, and the answers grow together one token at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from framestream.pipeline.loading.batch import Batch
from framestream.trainer.model.video_llm import VideoLLM


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest one at ``temperature`` 0, else drawn.

    A draw depends on the seed, the dialogue's key and the place in the answer, not on what else is in the batch.
    """

    temperature: float = 0.0  #: logits are divided by it
    top_p: float = 1.0  #: only the likeliest tokens are drawn from, as few as reach this probability together
    seed: int = 0

    def sample(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Token ids, int64 (B,), from ``logits`` (B, V)."""
        if not self.temperature:
            return logits.argmax(-1)
        likely, ids = (logits.float() / self.temperature).softmax(-1).cpu().sort(dim=-1, descending=True, stable=True)
        likely = likely.masked_fill(likely.cumsum(-1) - likely >= self.top_p, 0)
        drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(likely, generators, strict=True)]
        return ids.gather(1, torch.stack(drawn)).squeeze(1).to(logits.device)

    def generators(self, keys: Sequence[str]) -> list[torch.Generator]:
        """A source of random numbers for each dialogue."""
        digests = [hashlib.sha256(f"{self.seed}:{key}".encode()).digest() for key in keys]
        return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]


GREEDY = Sampling()


class PrefillState(NamedTuple):
    """B prompts that a model has read."""

    cache: DynamicCache  #: keys and values (B, heads, longest, D), padded on the left with zeros
    lengths: list[int]  #: tokens of each dialogue
    logits: torch.Tensor  #: (B, V) of each dialogue's next token

    def select(self, number: int) -> PrefillState:
        """One of the dialogues, with a cache of its own."""
        length, cache = self.lengths[number], DynamicCache()
        for n, layer in enumerate(self.cache.layers):
            cache.update(*(kept[number : number + 1, :, -length:].clone() for kept in (layer.keys, layer.values)), n)
        return PrefillState(cache, [length], self.logits[number : number + 1])


def generate(
    model: VideoLLM,
    prompts: Sequence[Batch],
    max_new_tokens: int,
    stop: int | Collection[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Continue every dialogue of every row.

    Args:
        model: in eval mode, on the prompts' device.
        prompts: rows of one or more prompts each; their labels and weights are not used.
        max_new_tokens: longest answer.
        stop: id or ids that end an answer.
        sampling: how tokens are chosen.

    Returns:
        Token ids of each answer without the one that ended it, in the order of the prompts.
    """
    keys = [key for row in prompts for key in row.keys]
    return generate_from_prefill(model, prefill(model, prompts), keys, max_new_tokens, stop, sampling)


def generate_from_prefill(
    model: VideoLLM,
    read: PrefillState,
    keys: Sequence[str],
    max_new_tokens: int,
    stop: int | Collection[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Continue dialogues that were read, whose ``keys`` these are; else as :func:`generate`. Their cache grows."""
    found: list[list[int]] = [[] for _ in keys]
    for step in decode_steps(model, *read, keys, max_new_tokens, stop, sampling):
        for dialogue, token in step:
            found[dialogue].append(token)
    return found


@torch.no_grad()
def decode_steps(
    model: VideoLLM,
    cache: DynamicCache,
    lengths: list[int],
    logits: torch.Tensor,
    keys: Sequence[str],
    max_new_tokens: int,
    stop: int | Collection[int],
    sampling: Sampling = GREEDY,
) -> Iterator[list[tuple[int, int]]]:
    """The next token of every dialogue that still grows, as (number of the dialogue, token), step by step.

    Args:
        cache, lengths, logits: as of :func:`prefill`; all tokens but the last of each step are added to the cache.
        keys: of the B dialogues.
        max_new_tokens, stop, sampling: as of :func:`generate`.
    """
    stop = {stop} if isinstance(stop, int) else set(stop)
    generators = sampling.generators(keys)
    device, longest = logits.device, max(lengths)
    length = torch.tensor(lengths, device=device)
    # (B, longest + max_new_tokens): which cached places hold a token of the dialogue rather than padding
    present = torch.arange(longest + max_new_tokens, device=device) >= (longest - length).unsqueeze(1)
    growing = [True] * len(lengths)
    for new in range(max_new_tokens):
        tokens = sampling.sample(logits, generators)  # (B,)
        found = list(enumerate(tokens.tolist()))
        growing = [grows and token not in stop for grows, (_, token) in zip(growing, found, strict=True)]
        yield [pair for grows, pair in zip(growing, found, strict=True) if grows]
        if not any(growing) or new + 1 == max_new_tokens:
            return
        hidden = model.language_model.model(
            inputs_embeds=model.language_model.model.embed_tokens(tokens).unsqueeze(1),
            attention_mask={"full_attention": present[:, None, None, : longest + new + 1]},
            position_ids=(length + new).unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = model.language_model.lm_head(hidden[:, 0])


@torch.no_grad()
def prefill(model: VideoLLM, prompts: Sequence[Batch]) -> PrefillState:
    """Run the prompts' rows one after the other."""
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
    return PrefillState(joined, lengths, torch.cat(logits))


def _pad_left(states: list[torch.Tensor], length: int) -> torch.Tensor:
    """(heads, l, D) tensors of different l -> (B, heads, length, D)."""
    return torch.stack([F.pad(state, (0, 0, length - state.shape[1], 0)) for state in states])
