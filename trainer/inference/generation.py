"""Generate answers to many prompts at once, greedy or sampled.

Prompts are run as rows, exactly as in training: packed, without padding and without masks over the sequence. Then their
keys and values are padded on the left to one length, and all answers grow together by one token a step.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from framestream.pipeline.loading.batch import Batch
from framestream.trainer.model.video_llm import CACHE_KEYWORD, VideoLLM


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the most likely one at ``temperature`` 0, a random one above.

    A random token depends on the seed, the dialogue's key and its position in the answer. It does not depend on the
    rest of the batch.
    """

    temperature: float = 0.0  #: logits are divided by it
    top_p: float = 1.0  #: sample from the most likely tokens only: the fewest whose probabilities reach this sum
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no distribution has."""
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}; it must be a finite number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def sample(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Choose token ids, int64 (B,), from ``logits`` (B, V)."""
        if not self.temperature:
            return logits.argmax(-1)
        probs, ids = (logits.float() / self.temperature).softmax(-1).cpu().sort(dim=-1, descending=True, stable=True)
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= self.top_p, 0)
        ranks = [torch.multinomial(row, 1, generator=g) for row, g in zip(probs, generators, strict=True)]
        return ids.gather(1, torch.stack(ranks)).squeeze(1).to(logits.device)

    def generators(self, keys: Sequence[str]) -> list[torch.Generator]:
        """Make a random number generator for each dialogue, seeded by its key."""
        digests = [hashlib.sha256(f"{self.seed}:{key}".encode()).digest() for key in keys]
        return [torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1) for digest in digests]


GREEDY = Sampling()


class PrefillState(NamedTuple):
    """State of a model after B prompts, from which answers are generated."""

    cache: DynamicCache  #: keys and values (B, heads, longest, D), padded on the left with zeros
    lengths: list[int]  #: tokens of each dialogue
    logits: torch.Tensor  #: (B, V) of each dialogue's next token

    def select(self, number: int) -> PrefillState:
        """Copy the state of one dialogue; its cache is independent of this one."""
        length, cache = self.lengths[number], DynamicCache()
        for n, (keys, values) in enumerate(_layer_states(self.cache)):
            one = slice(number, number + 1)
            cache.update(keys[one, :, -length:].clone(), values[one, :, -length:].clone(), n)
        return PrefillState(cache, [length], self.logits[number : number + 1])


def generate(
    model: VideoLLM,
    prompts: Sequence[Batch],
    max_new_tokens: int,
    stop: int | Collection[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Generate an answer to every dialogue of every prompt.

    Args:
        model: in eval mode, on the prompts' device.
        prompts: rows of one or more dialogues each; their labels and weights are not used.
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
    state: PrefillState,
    keys: Sequence[str],
    max_new_tokens: int,
    stop: int | Collection[int],
    sampling: Sampling = GREEDY,
) -> list[list[int]]:
    """Generate answers to prompts that were run by :func:`prefill`; the cache of ``state`` grows.

    Args:
        keys: of the dialogues of ``state``.
        model, max_new_tokens, stop, sampling: as in :func:`generate`.
    """
    answers: list[list[int]] = [[] for _ in keys]
    for step in decode_steps(model, *state, keys, max_new_tokens, stop, sampling):
        for dialogue, token in step:
            answers[dialogue].append(token)
    return answers


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
    """Yield for each step the next token of every unfinished dialogue, as (number of the dialogue, token).

    Args:
        cache, lengths, logits: as in :class:`PrefillState`. All tokens but those of the last step enter the cache.
        keys: of the B dialogues.
        max_new_tokens, stop, sampling: as in :func:`generate`.
    """
    stop = {stop} if isinstance(stop, int) else set(stop)
    generators = sampling.generators(keys)
    device, longest = logits.device, max(lengths)
    length = torch.tensor(lengths, device=device)
    # (B, longest + max_new_tokens): which cache positions hold a token of the dialogue rather than padding
    present = torch.arange(longest + max_new_tokens, device=device) >= (longest - length).unsqueeze(1)
    unfinished = [True] * len(lengths)
    for new in range(max_new_tokens):
        tokens = sampling.sample(logits, generators)  # (B,)
        pairs = list(enumerate(tokens.tolist()))
        unfinished = [grows and token not in stop for grows, (_, token) in zip(unfinished, pairs, strict=True)]
        yield [pair for grows, pair in zip(unfinished, pairs, strict=True) if grows]
        if not any(unfinished) or new + 1 == max_new_tokens:
            return
        hidden = model.language_model.model(
            inputs_embeds=model.language_model.model.embed_tokens(tokens).unsqueeze(1),
            attention_mask={"full_attention": present[:, None, None, : longest + new + 1]},
            position_ids=(length + new).unsqueeze(1),
            **{CACHE_KEYWORD: cache},
            use_cache=True,
        ).last_hidden_state
        logits = model.language_model.lm_head(hidden[:, 0])


@torch.no_grad()
def prefill(model: VideoLLM, prompts: Sequence[Batch]) -> PrefillState:
    """Run the prompts' rows one after the other, and lay their keys and values side by side."""
    lengths: list[int] = []
    logits: list[torch.Tensor] = []
    layers: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for row in prompts:
        cache = DynamicCache(config=model.language_model.config)
        hidden = model.hidden(row, row.cu_seqlens[1:].long() - 1, cache)
        logits.append(model.language_model.lm_head(hidden))
        lengths += row.lengths
        layers = layers or [([], []) for _ in cache.layers]
        for (all_keys, all_values), (keys, values) in zip(layers, _layer_states(cache), strict=True):
            all_keys += keys.squeeze(0).split(row.lengths, dim=1)  # each (heads, length, D)
            all_values += values.squeeze(0).split(row.lengths, dim=1)
    joined = DynamicCache(config=model.language_model.config)
    for n, (all_keys, all_values) in enumerate(layers):
        joined.update(_pad_left(all_keys, max(lengths)), _pad_left(all_values, max(lengths)), n)
    return PrefillState(joined, lengths, torch.cat(logits))


def _layer_states(cache: DynamicCache) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the keys and values of every layer, (B, heads, length, D) each."""
    layers: list[Any] = list(cache.layers)  # transformers' base class of layers does not promise keys and values
    for layer in layers:
        yield layer.keys, layer.values


def _pad_left(states: list[torch.Tensor], length: int) -> torch.Tensor:
    """Pad (heads, l, D) tensors of different l with zeros on the left: (B, heads, length, D)."""
    return torch.stack([F.pad(state, (0, 0, length - state.shape[1], 0)) for state in states])
