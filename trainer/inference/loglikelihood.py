"""How likely a model takes given answers to be; a question is read once, however many answers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from framestream.trainer.inference.generate import PrefillState
from framestream.trainer.model.video_llm import VideoLLM


class LogLikelihood(NamedTuple):
    """Of one answer."""

    logprob: float  #: natural logarithm of the probability of all its tokens, one after the other
    is_greedy: bool  #: whether greedy generation would give these tokens


@torch.no_grad()
def loglikelihood(model: VideoLLM, read: PrefillState, answers: Sequence[Sequence[int]]) -> list[LogLikelihood]:
    """Likelihoods of ``answers`` (token ids, at least one each) after the one dialogue of ``read``, whose cache grows.

    Args:
        model: in eval mode, on the dialogue's device.
    """
    if not all(answers):
        raise ValueError("an answer without tokens has no likelihood")
    cache, (length,), logits = read
    longest = max(map(len, answers))
    ids = torch.tensor([[*answer, *[0] * (longest - len(answer))] for answer in answers], device=logits.device)
    first = logits.expand(len(answers), 1, -1)
    if longest > 1:
        cache.batch_repeat_interleave(len(answers))
        places = torch.arange(length + longest - 1, device=ids.device)
        hidden = model.language_model.model(
            inputs_embeds=model.language_model.model.embed_tokens(ids[:, :-1]),
            attention_mask={"full_attention": (places <= places[length:, None])[None, None]},
            position_ids=places[length:].expand(len(answers), -1),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = torch.cat([first, model.language_model.lm_head(hidden)], dim=1)
    else:
        logits = first
    each = logits.float().log_softmax(-1).gather(2, ids.unsqueeze(2)).squeeze(2)
    same = logits.argmax(-1) == ids
    return [
        LogLikelihood(float(each[n, : len(answer)].sum()), bool(same[n, : len(answer)].all()))
        for n, answer in enumerate(answers)
    ]
