"""Answer one question after another about the same media, with the keys and values of earlier turns in memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from transformers import DynamicCache

from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX
from framestream.trainer.inference.generation import GREEDY, Sampling, decode_steps, prefill
from framestream.trainer.model.video_llm import CACHE_KEYWORD, VideoLLM


class ChatSession:
    """One conversation, in tokens.

    Keys and values of the conversation so far stay in memory. Where a prompt begins with it, only the new tokens are
    run. :class:`~framestream.trainer.inference.conversation.Conversation` is the same in text.

    Args:
        model: in eval mode.
        max_new_tokens: longest answer.
        stop: id or ids that end an answer.
        sampling: how tokens are chosen.
    """

    def __init__(
        self, model: VideoLLM, max_new_tokens: int, stop: int | Collection[int], sampling: Sampling = GREEDY
    ) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._max_new_tokens, self._stop, self._sampling = max_new_tokens, stop, sampling
        self._cache = DynamicCache(config=model.language_model.config)
        self._ids: list[int] = []  # of the conversation so far; the cache may lack the last one

    def answer(self, prompt: Batch) -> Iterator[int]:
        """Yield the tokens of the answer one by one.

        Args:
            prompt: one dialogue. Its media are those of the prompts before. Further media may only follow them.
        """
        ids = prompt.input_ids.tolist()
        cached = self._count_cached(ids)
        if cached:
            logits = self._extend(prompt, cached)
        else:
            self._cache, _, logits = prefill(self._model, [prompt.to(self._device)])
        self._ids = ids
        state = (self._cache, [len(ids)], logits, prompt.keys)
        for step in decode_steps(self._model, *state, self._max_new_tokens, self._stop, self._sampling):
            for _, token in step:
                yield token
                self._ids.append(token)  # in the cache once the next one is requested

    def _count_cached(self, ids: list[int]) -> int:
        """Count how many of ``ids`` the cache holds; at least one is left to be run.

        Returns 0 if the new tokens show media: these need the vision tower, so the prompt is run from its start.
        """
        cached_ids = self._ids[: self._cache.get_seq_length()]
        pairs = zip(cached_ids, ids[:-1], strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(cached_ids), len(ids) - 1))
        return 0 if IMAGE_TOKEN_INDEX in ids[shared:] else shared

    @torch.no_grad()
    def _extend(self, prompt: Batch, cached: int) -> torch.Tensor:
        """Run the tokens of a prompt after the first ``cached``; returns the logits (1, V) after its last token."""
        model, length = self._model.language_model, len(prompt.input_ids)
        if surplus := self._cache.get_seq_length() - cached:
            self._cache.crop(-surplus)
        positions = torch.arange(length, device=self._device)
        hidden = model.model(
            inputs_embeds=model.model.embed_tokens(prompt.input_ids[cached:].to(self._device)).unsqueeze(0),
            attention_mask={"full_attention": (positions <= positions[cached:, None])[None, None]},
            position_ids=positions[cached:].unsqueeze(0),
            **{CACHE_KEYWORD: self._cache},
            use_cache=True,
        ).last_hidden_state
        return model.lm_head(hidden[:, -1])


def stream_text(tokens: Iterator[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Yield the text of ``tokens`` piece by piece.

    A character may have several tokens. It is yielded when all of them have arrived: until then ``decode`` ends with
    the replacement character.

    Args:
        tokens: ids, as :meth:`ChatSession.answer` yields them.
        decode: from all ids so far to their text.
    """
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text
    rest = decode(ids)[len(shown) :]
    if rest:
        yield rest
