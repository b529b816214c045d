"""Likelihoods of answers beside full passes over question and answer together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.inference.generation import generate, prefill
from framestream.trainer.inference.likelihood import loglikelihood
from tests.helpers.model.rows import SMALL, dialogue, pack, small_model

ANSWERS = [[5], [9, 3, 7, 11], [9, 3], [1, 2, 3]]


@pytest.fixture(scope="module")
def model():
    return small_model(cfg=SMALL, scale=15.0).eval()


@pytest.mark.parametrize("prompt", [dialogue(1, clips=2, stills=1, text=9), dialogue(2, text=4)], ids=["media", "text"])
@torch.no_grad()
def test_the_likelihood_is_that_of_question_and_answer_read_together(model, prompt):
    for answer, (found, _) in zip(
        ANSWERS, loglikelihood(model, prefill(model, [pack([prompt])]), ANSWERS), strict=True
    ):
        whole = dataclasses.replace(
            prompt, ids=[*prompt.ids, *answer], labels=[*[IGNORE_INDEX] * len(prompt.ids), *answer], weight=1.0
        )
        assert found == pytest.approx(-float(model(pack([whole]))), rel=1e-5)


def test_the_greedy_answer_is_known_as_such(model):
    prompt = pack([dialogue(3, clips=1, text=6)])
    greedy = generate(model, [prompt], 4, -1)[0]
    other = [*greedy[:3], (greedy[3] + 1) % 20]
    found = loglikelihood(model, prefill(model, [prompt]), [greedy, greedy[:2], other])
    assert [answer.is_greedy for answer in found] == [True, True, False]


def test_all_next_tokens_together_are_certain(model):
    prompt = pack([dialogue(4, stills=1, text=6)])
    words = [[token] for token in range(SMALL.language_model.vocab_size)]
    logs = torch.tensor([found.logprob for found in loglikelihood(model, prefill(model, [prompt]), words)])
    assert float(logs.exp().sum()) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="without tokens"):
        loglikelihood(model, prefill(model, [prompt]), [[1], []])


@torch.no_grad()
def test_one_of_several_that_were_read_is_as_if_read_alone(model):
    prompts = [pack([dialogue(5, clips=1, text=3)]), pack([dialogue(6, text=8), dialogue(7, stills=1, text=5)])]
    read = prefill(model, prompts)
    for number, prompt in enumerate([dialogue(5, clips=1, text=3), dialogue(6, text=8), dialogue(7, stills=1, text=5)]):
        alone = loglikelihood(model, prefill(model, [pack([prompt])]), ANSWERS)
        found = loglikelihood(model, read.select(number), ANSWERS)
        assert [f.logprob for f in found] == pytest.approx([a.logprob for a in alone], rel=1e-5)
    assert read.cache.get_seq_length() == max(read.lengths)  # the others can still be continued
