"""Likelihoods of answers beside full passes over question and answer together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.batch import IGNORE
from tests.trainer.model.rows import SMALL, dialogue, pack, small_model
from trainer.generate import generate
from trainer.likelihood import likelihoods

ANSWERS = [[5], [9, 3, 7, 11], [9, 3], [1, 2, 3]]


@pytest.fixture(scope="module")
def model():
    return small_model(cfg=SMALL, scale=15.0).eval()


@pytest.mark.parametrize("prompt", [dialogue(1, clips=2, stills=1, text=9), dialogue(2, text=4)], ids=["media", "text"])
@torch.no_grad()
def test_the_likelihood_is_that_of_question_and_answer_read_together(model, prompt):
    for answer, (found, _) in zip(ANSWERS, likelihoods(model, pack([prompt]), ANSWERS), strict=True):
        whole = dataclasses.replace(
            prompt, ids=[*prompt.ids, *answer], labels=[*[IGNORE] * len(prompt.ids), *answer], weight=1.0
        )
        assert found == pytest.approx(-float(model(pack([whole]))), rel=1e-5)


def test_the_greedy_answer_is_known_as_such(model):
    prompt = pack([dialogue(3, clips=1, text=6)])
    greedy = generate(model, [prompt], 4, -1)[0]
    other = [*greedy[:3], (greedy[3] + 1) % 20]
    assert [found.greedy for found in likelihoods(model, prompt, [greedy, greedy[:2], other])] == [True, True, False]


def test_all_next_tokens_together_are_certain(model):
    prompt = pack([dialogue(4, stills=1, text=6)])
    words = [[token] for token in range(SMALL.language_model.vocab_size)]
    logs = torch.tensor([found.log for found in likelihoods(model, prompt, words)])
    assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="without tokens"):
        likelihoods(model, prompt, [[1], []])
