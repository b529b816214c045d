"""Compute log-likelihoods of given answers; a prompt is run once for all its answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from framestream.trainer.inference.generation import PrefillState
from framestream.trainer.model.video_llm import CACHE_KEYWORD, VideoLLM


class LogLikelihood(NamedTuple):
    """How likely a model finds one answer."""

    logprob: float  #: natural logarithm of the probability of all its tokens
    is_greedy: bool  #: whether greedy generation gives these tokens


@torch.no_grad()
def loglikelihood(model: VideoLLM, state: PrefillState, answers: Sequence[Sequence[int]]) -> list[LogLikelihood]:
    """Compute the log-likelihood of each of ``answers`` after the dialogue of ``state``.

    Args:
        model: in eval mode, on the dialogue's device.
        state: one dialogue, as :func:`.generation.prefill` returns it. Its cache grows, so it
            cannot be used again.
        answers: token ids, at least one in each.

    Raises:
        ValueError: an answer has no tokens.
    """
    if not all(answers):
        raise ValueError("an answer without tokens has no likelihood")
    cache, (length,), logits = state
    longest = max(map(len, answers))
    # shorter answers are padded with id 0 at their end, where causal attention hides it
    ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=logits.device)
    first = logits.expand(len(answers), 1, -1)
    if longest > 1:
        cache.batch_repeat_interleave(len(answers))
        positions = torch.arange(length + longest - 1, device=ids.device)
        hidden = model.language_model.model(
            inputs_embeds=model.language_model.model.embed_tokens(ids[:, :-1]),
            attention_mask={"full_attention": (positions <= positions[length:, None])[None, None]},
            position_ids=positions[length:].expand(len(answers), -1),
            **{CACHE_KEYWORD: cache},
            use_cache=True,
        ).last_hidden_state
        logits = torch.cat([first, model.language_model.lm_head(hidden)], dim=1)
    else:
        logits = first
    logprobs = logits.float().log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    greedy = logits.argmax(-1) == ids
    return [
        LogLikelihood(float(logprobs[n, : len(answer)].sum()), bool(greedy[n, : len(answer)].all()))
        for n, answer in enumerate(answers)
    ]
