"""Generation with a cache equals recomputing everything for every token, and a batch equals its prompts alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from framestream.pipeline.config.model import ModelConfig
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.trainer.inference.generation import Sampling, generate
from tests.helpers.model.rows import SMALL, Dialogue, dialogue, no_clips, no_stills, pack, small_model

NEW = 12


@pytest.fixture(scope="module", params=[False, True], ids=["own_head", "tied_head"])
def model(request):
    language = dataclasses.replace(SMALL.language_model, tie_word_embeddings=request.param)
    return small_model(cfg=ModelConfig(vision_tower=SMALL.vision_tower, language_model=language), scale=15.0).eval()


def recomputed(model, prompt: Dialogue, stop: int) -> list[int]:
    """Greedy answer from full forward passes, without a cache."""
    prompt, answer = dataclasses.replace(prompt), []
    for _ in range(NEW):
        row = pack([prompt])
        token = int(model.language_model.lm_head(model.hidden(row))[-1].argmax())
        if token == stop:
            break
        answer.append(token)
        prompt.ids, prompt.labels = [*prompt.ids, token], [*prompt.labels, IGNORE_INDEX]
    return answer


PROMPTS = [
    dialogue(1, clips=2, text=9),
    dialogue(2, stills=1, text=30),
    dialogue(3, text=5),
    dialogue(4, text=21),
    dialogue(5, clips=1, stills=1, text=14),
]


@torch.no_grad()
def test_cached_and_batched_equals_recomputed_alone(model):
    never = -1
    expected = [recomputed(model, prompt, never) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) == len(PROMPTS)  # the prompts are really told apart
    assert generate(model, [pack([prompt]) for prompt in PROMPTS], NEW, never) == expected
    assert generate(model, [pack(PROMPTS[:2]), pack(PROMPTS[2:])], NEW, never) == expected


@torch.no_grad()
def test_answers_end_before_the_stop_token_each_for_itself(model):
    whole = generate(model, [pack(PROMPTS)], NEW, -1)
    stop = whole[0][3]
    for answer, full in zip(generate(model, [pack(PROMPTS)], NEW, stop), whole, strict=True):
        assert answer == (full[: full.index(stop)] if stop in full else full)
    assert generate(model, [pack(PROMPTS)], NEW, set(range(SMALL.language_model.vocab_size))) == [[]] * len(PROMPTS)


def test_generation_sees_the_frames(model):
    prompt = dialogue(7, clips=1, text=4)
    other = dataclasses.replace(prompt, clips=dialogue(8, clips=1).clips)
    with torch.no_grad():
        logits = [model.language_model.lm_head(model.hidden(pack([p])))[-1] for p in (prompt, other)]
    assert prompt.ids == other.ids and IMAGE_TOKEN_INDEX in prompt.ids and not torch.allclose(*logits)


def test_a_text_prompt_needs_no_media(model):
    text = Dialogue([5, 6, 7], [IGNORE_INDEX] * 3, no_clips(), no_stills())
    assert len(generate(model, [pack([text])], 3, -1)[0]) == 3


def test_what_is_drawn_does_not_depend_on_the_rest_of_the_batch(model):
    sampling, drawn = Sampling(temperature=1.5, top_p=0.9, seed=3), {}
    rows = [dataclasses.replace(pack([prompt]), keys=[f"d{n}"]) for n, prompt in enumerate(PROMPTS)]
    alone = [generate(model, [row], NEW, -1, sampling)[0] for row in rows]
    assert generate(model, [pack(PROMPTS)], NEW, -1, sampling) == alone
    for seed in range(4):
        drawn[seed] = generate(model, rows, NEW, -1, dataclasses.replace(sampling, seed=seed))
    assert len({str(answers) for answers in drawn.values()}) == 4
    assert generate(model, rows, NEW, -1, Sampling(temperature=1e-4)) == generate(model, rows, NEW, -1)


@pytest.mark.parametrize(("top_p", "kept"), [(1.0, {0, 1, 2, 3}), (0.81, {0, 1, 2}), (0.8, {0, 1}), (0.01, {0})])
def test_tokens_are_drawn_by_their_probability_from_the_likeliest(top_p, kept):
    """Probabilities 0.5, 0.3, 0.15 and 0.05 at temperature 2; as few tokens as reach ``top_p`` together."""
    logits = 2 * torch.tensor([[0.3, 0.5, 0.05, 0.15]]).log()
    names = {1: 0, 0: 1, 3: 2, 2: 3}  # token -> rank
    sampling = Sampling(temperature=2.0, top_p=top_p)
    generators = sampling.generators(["a"])
    ranks = [names[int(sampling.sample(logits, generators))] for _ in range(2000)]
    shares = [ranks.count(rank) / 2000 for rank in range(4)]
    whole = sum((0.5, 0.3, 0.15, 0.05)[rank] for rank in kept)
    for rank, probability in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert shares[rank] == pytest.approx(probability / whole if rank in kept else 0, abs=0.05)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", v) for v in (-1.0, float("nan"), float("inf"))] + [("top_p", v) for v in (0.0, 2.0, float("nan"))],
)
def test_values_that_no_distribution_has_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} is .*; it must be"):
        Sampling(**{field: value})
