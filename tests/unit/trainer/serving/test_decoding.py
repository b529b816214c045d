"""Answers that begin and end at different steps are those that each prompt has alone."""

from __future__ import annotations

import pytest
import torch

from framestream.trainer.inference.generation import GREEDY, Sampling, generate, prefill
from framestream.trainer.serving.decoding import DecodingBatch
from tests.helpers.model.rows import dialogue, pack, small_model

PROMPTS = [
    dialogue(1, clips=2, text=9),
    dialogue(2, stills=1, text=30),
    dialogue(3, text=5),
    dialogue(4, text=21),
    dialogue(5, clips=1, stills=1, text=14),
]
#: of each prompt: the step at which it begins, its tokens, and its sampling
TIMES = [(0, 9, GREEDY), (0, 4, Sampling(1.5, 0.9, 3)), (2, 12, GREEDY), (5, 3, Sampling(0.7, 1.0, 4)), (7, 8, GREEDY)]


@pytest.fixture(scope="module")
def model():
    return small_model(scale=15.0).eval()


def grow(model, prompts: list, times: list) -> list[list[int]]:
    """Grow answers in one batch, each from its step on."""
    batch, answers = DecodingBatch(model), {}
    for step in range(40):
        for number, (begin, _, sampling) in enumerate(times):
            if begin == step:
                answers[number] = batch.add(prefill(model, [pack([prompts[number]])]), sampling)
        if batch.answers:
            batch.choose()
            ended = [
                answers[n] for n, (_, count, _) in enumerate(times) if n in answers and len(answers[n].tokens) == count
            ]
            batch.remove(ended)
        if batch.answers:
            batch.extend()
    assert not batch.answers and batch.width == 0
    return [answers[number].tokens for number in range(len(times))]


def test_answers_do_not_depend_on_the_others(model):
    found = grow(model, PROMPTS, TIMES)
    for prompt, (_, count, sampling), tokens in zip(PROMPTS, TIMES, found, strict=True):
        row = pack([prompt])
        row.keys = [""]
        assert tokens == generate(model, [row], count, -1, sampling)[0]
    assert len({tuple(tokens[:3]) for tokens in found}) == len(PROMPTS)


def test_memory_of_the_longest_is_freed_when_it_ends(model):
    batch = DecodingBatch(model)
    long, short = (batch.add(prefill(model, [pack([dialogue(n, text=n)])]), GREEDY) for n in (60, 5))
    assert batch.width == long.length
    batch.remove([long])
    assert batch.width == short.length == batch._layers[0][0].shape[2]
    with torch.no_grad():
        batch.choose()
        batch.extend()
    assert short.length == batch.width
