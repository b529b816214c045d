"""Losses and answers of a model whose parameters the ranks share: all ranks make the same calls at the same time.

ZeRO-3 gathers parameters in module calls, so a rank without a row, or whose answer is complete, makes the calls of one
with an empty row. Every use of the model is a call of the model itself, with its parts in the order of training: tower,
connector, embedding, layers, head. So it is a beginning of the sequence that DeepSpeed has recorded for the forward and
backward pass, which stays valid. A step of generation sees no media: its tower and connector run on a dummy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch

from framestream.pipeline.loading.batch import Batch
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max_int
from framestream.trainer.inference.generation import decode_steps, prefill
from framestream.trainer.inference.likelihood import loglikelihood
from framestream.trainer.model.video_llm import VideoLLM

Result = TypeVar("Result")

UNUSED_ANSWER = (0, 0)  #: two tokens, so that comparing answers always takes one call


class LockstepModel:
    """A model in eval mode that all ranks ask together. Each method is called by all ranks, the same number of times.

    Args:
        model: in eval mode.
        context: this rank.
        idle: the empty row, on the model's device.
    """

    def __init__(self, model: VideoLLM, context: DistributedContext, idle: Batch) -> None:
        self._model, self._context, self._idle = model, context, idle

    @torch.no_grad()
    def loss(self, row: Batch | None) -> float:
        """Return the loss of a row, 0 for None."""
        return float(self._model(row or self._idle))

    @torch.no_grad()
    def answer(
        self,
        prompt: Batch | None,
        options: Sequence[Sequence[int]],
        compare: bool,
        max_new_tokens: int,
        stop: Collection[int],
    ) -> tuple[list[int], list[float]]:
        """Answer the question of a prompt by greedy generation, and compare its options.

        Args:
            prompt: a row of one dialogue; None if this rank has none.
            options: token ids of the answers to choose from; empty if the question has none.
            compare: whether the question of any rank has options; the same on all ranks.
            max_new_tokens: longest answer; 0 generates none. The same on all ranks.
            stop: ids that end an answer.

        Returns:
            the tokens of the answer, and the log-likelihood of each option.
        """
        state = self._call(lambda: prefill(self._model, [prompt or self._idle]))
        logprobs: list[float] = []
        if compare:
            answers = [*options, UNUSED_ANSWER]
            alone = state.select(0)
            found = self._call(lambda: self._without_media(lambda: loglikelihood(self._model, alone, answers)))
            logprobs = [each.logprob for each in found[:-1]]
        keys = prompt.keys if prompt else [""]
        steps = decode_steps(self._model, *state, keys, max_new_tokens, stop)
        tokens: list[int] = []
        token = next(steps, []) if prompt else []  # the first one needs no call
        for length in range(1, max_new_tokens + 1):
            tokens += [number for _, number in token]
            grows = bool(token) and length < max_new_tokens
            if not all_reduce_max_int(int(grows), self._context):
                break
            token = self._call(functools.partial(self._without_media, steps.__next__) if grows else self._wait)
        return tokens, logprobs

    def _wait(self) -> list[tuple[int, int]]:
        """Make the calls of one token, while other ranks generate theirs."""
        prefill(self._model, [self._idle])
        return []

    def _without_media(self, function: Callable[[], Result]) -> Result:
        """Call tower and connector as every call of the model does, then ``function``."""
        self._model.visual_tokens(self._idle)
        return function()

    def _call(self, function: Callable[[], Result]) -> Result:
        """Return the result of ``function``, which uses the parts of the model, inside a call of the model."""
        found: list[Result] = []

        def compute() -> torch.Tensor:
            found.append(function())
            return torch.zeros((), device=self._idle.input_ids.device)

        self._model(self._idle, compute)
        return found[0]
