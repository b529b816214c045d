"""Answers that grow together by one token a step, while others begin and end: continuous batching.

Keys and values are padded on the left to one length, as in :mod:`framestream.trainer.inference.generation`. Each answer
has its own sampling and its own random numbers, so it does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from framestream.trainer.inference.generation import PrefillState, Sampling
from framestream.trainer.model.video_llm import CACHE_KEYWORD, VideoLLM


@dataclass(eq=False)
class GrowingAnswer:
    """An answer, and the state from which its next token is chosen."""

    sampling: Sampling
    length: int  #: tokens of the dialogue so far; all have keys and values
    logits: torch.Tensor  #: (V,) of the next token
    tokens: list[int] = field(default_factory=list)  #: of the answer
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        (self.generator,) = self.sampling.generators([""])


class DecodingBatch:
    """The answers that grow now.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: VideoLLM) -> None:
        self._model = model
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values (B, heads, width, D)
        self.answers: list[GrowingAnswer] = []

    @property
    def width(self) -> int:
        """Length to which keys and values are padded."""
        return max((answer.length for answer in self.answers), default=0)

    def add(self, state: PrefillState, sampling: Sampling) -> GrowingAnswer:
        """Begin the answer to one dialogue.

        Args:
            state: of one dialogue.
        """
        answer = GrowingAnswer(sampling, state.lengths[0], state.logits[0])
        width = max(self.width, answer.length)
        layers: Sequence[Any] = state.cache.layers
        new = [(layer.keys, layer.values) for layer in layers]
        old = self._layers or [(keys[:0], values[:0]) for keys, values in new]
        self._layers = [
            (_stack(old_keys, keys, width), _stack(old_values, values, width))
            for (old_keys, old_values), (keys, values) in zip(old, new, strict=True)
        ]
        self.answers.append(answer)
        return answer

    def remove(self, ended: Sequence[GrowingAnswer]) -> None:
        """End answers, and free their keys and values."""
        kept = [number for number, answer in enumerate(self.answers) if answer not in ended]
        if len(kept) == len(self.answers):
            return
        self.answers = [self.answers[number] for number in kept]
        width = self.width
        self._layers = [(keys[kept, :, -width:], values[kept, :, -width:]) for keys, values in self._layers]
        if not kept:
            self._layers = []

    def choose(self) -> list[int]:
        """Choose the next token of every answer, and add it to the answer."""
        greedy = [answer for answer in self.answers if not answer.sampling.temperature]
        if greedy:
            best = torch.stack([answer.logits for answer in greedy]).argmax(-1).tolist()
            for answer, token in zip(greedy, best, strict=True):
                answer.tokens.append(token)
        for answer in self.answers:
            if answer.sampling.temperature:
                token = answer.sampling.sample(answer.logits.unsqueeze(0), [answer.generator])
                answer.tokens.append(int(token))
        return [answer.tokens[-1] for answer in self.answers]

    @torch.no_grad()
    def extend(self) -> None:
        """Run the last token of every answer, so that the next ones can be chosen."""
        model, device = self._model.language_model, self.answers[0].logits.device
        width = self.width
        tokens = torch.tensor([answer.tokens[-1] for answer in self.answers], device=device)
        length = torch.tensor([answer.length for answer in self.answers], device=device)
        # (B, width + 1): which positions hold a token of the dialogue rather than padding
        present = torch.arange(width + 1, device=device) >= (width - length).unsqueeze(1)
        cache = DynamicCache(config=model.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys, values, number)
        hidden = model.model(
            inputs_embeds=model.model.embed_tokens(tokens).unsqueeze(1),
            attention_mask={"full_attention": present[:, None, None]},
            position_ids=length.unsqueeze(1),
            **{CACHE_KEYWORD: cache},
            use_cache=True,
        ).last_hidden_state
        logits = model.lm_head(hidden[:, 0])
        layers: list[Any] = list(cache.layers)
        self._layers = [(layer.keys, layer.values) for layer in layers]
        for answer, row in zip(self.answers, logits, strict=True):
            answer.length += 1
            answer.logits = row


def _stack(old: torch.Tensor, new: torch.Tensor, width: int) -> torch.Tensor:
    """Put ``new`` (1, heads, l, D) below ``old`` (B, heads, k, D), both padded with zeros on the left to ``width``."""
    return torch.cat([F.pad(states, (0, 0, width - states.shape[2], 0)) for states in (old, new)])
