"""A conversation about the same media: what was read once stays in memory between questions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from transformers import DynamicCache

from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX
from framestream.trainer.inference.generate import GREEDY, Sampling, decode_steps, prefill
from framestream.trainer.model.video_llm import VideoLLM


class ChatSession:
    """Keeps keys and values of what was said; a question whose prompt begins with it costs only what is new.

    Args:
        model: in eval mode.
        stop: id or ids that end an answer.
    """

    def __init__(
        self, model: VideoLLM, max_new_tokens: int, stop: int | Collection[int], sampling: Sampling = GREEDY
    ) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._limit, self._stop, self._sampling = max_new_tokens, stop, sampling
        self._cache, self._ids = DynamicCache(config=model.language_model.config), []

    def answer(self, prompt: Batch) -> Iterator[int]:
        """Tokens of the answer, one by one.

        Args:
            prompt: one dialogue. Its media are those of the prompts before, with further ones at its end, if any.
        """
        ids = prompt.input_ids.tolist()
        known = self._known(ids)
        if known:
            logits = self._read_on(prompt, known)
        else:
            self._cache, _, logits = prefill(self._model, [prompt.to(self._device)])
        self._ids = ids
        place = (self._cache, [len(ids)], logits, prompt.keys)
        for found in decode_steps(self._model, *place, self._limit, self._stop, self._sampling):
            for _, token in found:
                yield token
                self._ids.append(token)  # in the cache once the next one is asked for

    def _known(self, ids: list[int]) -> int:
        """How many of ``ids`` the cache holds, 0 if what is new shows media; at least one is left to be read."""
        held = self._ids[: self._cache.get_seq_length()]
        pairs = zip(held, ids[:-1], strict=False)
        known = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(held), len(ids) - 1))
        return 0 if IMAGE_TOKEN_INDEX in ids[known:] else known

    @torch.no_grad()
    def _read_on(self, prompt: Batch, known: int) -> torch.Tensor:
        """Logits (1, V) after the prompt, of which the cache holds ``known`` tokens."""
        model, length = self._model.language_model, len(prompt.input_ids)
        if surplus := self._cache.get_seq_length() - known:
            self._cache.crop(-surplus)
        places = torch.arange(length, device=self._device)
        hidden = model.model(
            inputs_embeds=model.model.embed_tokens(prompt.input_ids[known:].to(self._device)).unsqueeze(0),
            attention_mask={"full_attention": (places <= places[known:, None])[None, None]},
            position_ids=places[known:].unsqueeze(0),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state
        return model.lm_head(hidden[:, -1])


def stream_text(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Text as it becomes certain: a character of several tokens is held back until it is whole."""
    ids, shown = [], ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = decode(ids)[len(shown) :]
    if rest:
        yield rest
