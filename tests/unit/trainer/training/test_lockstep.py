"""Lockstep answers equal ordinary ones, and every rank makes the calls of training, in their order."""

from __future__ import annotations

import pytest
import torch

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.evaluation.held_out import empty_row
from framestream.trainer.distributed.call_order import outer_modules
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.inference.generation import generate, prefill
from framestream.trainer.inference.likelihood import loglikelihood
from framestream.trainer.training import lockstep
from framestream.trainer.training.lockstep import LockstepModel
from tests.helpers.model.rows import SIZE, dialogue, pack, small_model

NEW, STOP = 6, (-1,)
OPTIONS = [[5], [7, 9, 11], [3, 3]]
EMPTY = empty_row(FramesConfig(sampler="middle", min=8, max=8, size=SIZE))


class Recorded:
    """A model whose module calls are recorded, one list for each call of the model itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, others_grow: list[int] | None = None) -> None:
        self.model = small_model(scale=15.0).eval()
        self.calls: list[list[str]] = []
        self.grows: list[int] = []
        self.model.register_forward_pre_hook(lambda *_: self.calls.append([]))
        for name, module in outer_modules(self.model, self.model.leaf_modules()).items():
            module.register_forward_pre_hook(lambda *_, name=name: self.calls[-1].append(name))
        others = iter(others_grow or [])

        def all_reduce_max_int(number: int, context: DistributedContext) -> int:
            self.grows.append(number)
            return max(number, next(others, 0))

        monkeypatch.setattr(lockstep, "all_reduce_max_int", all_reduce_max_int)
        self.lockstep = LockstepModel(self.model, DistributedContext(0, 1, torch.device("cpu")), EMPTY)


@pytest.mark.parametrize("prompt", [dialogue(1, clips=2, text=9), dialogue(3, text=5)], ids=["video", "text"])
def test_answers_and_losses_are_those_of_the_model_alone(monkeypatch, prompt):
    recorded, row = Recorded(monkeypatch), pack([prompt])
    tokens, logprobs = recorded.lockstep.answer(row, OPTIONS, True, NEW, STOP)
    loss = recorded.lockstep.loss(row)
    plain = small_model(scale=15.0).eval()
    assert tokens == generate(plain, [row], NEW, STOP)[0] and len(tokens) == NEW
    alone = loglikelihood(plain, prefill(plain, [row]), OPTIONS)
    assert logprobs == pytest.approx([each.logprob for each in alone], rel=1e-5)
    with torch.no_grad():
        assert loss == float(plain(row))


def test_every_call_is_a_beginning_of_the_sequence_of_training(monkeypatch):
    """Else DeepSpeed's record of the order becomes invalid, and nothing is gathered ahead in the next steps."""
    recorded = Recorded(monkeypatch)
    recorded.lockstep.loss(pack([dialogue(1, clips=1)]))
    (trained,) = recorded.calls
    assert trained[0] == "vision_tower" and trained[-1] == "language_model.lm_head"
    recorded.calls.clear()
    recorded.lockstep.answer(pack([dialogue(2, clips=3, stills=1)]), OPTIONS, True, NEW, STOP)
    recorded.lockstep.loss(None)
    assert recorded.calls == [trained] * (1 + 1 + NEW - 1 + 1)


@pytest.mark.parametrize("options", [OPTIONS, []], ids=["options", "none"])
def test_a_rank_without_a_question_makes_the_calls_of_one_with(monkeypatch, options):
    asking = Recorded(monkeypatch)
    asking.lockstep.answer(pack([dialogue(2, clips=1)]), options, bool(options), NEW, STOP)
    idle = Recorded(monkeypatch, asking.grows)
    assert idle.lockstep.answer(None, [], bool(options), NEW, STOP)[0] == []
    assert idle.calls == asking.calls and len(idle.grows) == len(asking.grows)
    first = generate(small_model(scale=15.0).eval(), [pack([dialogue(2, clips=1)])], 1, STOP)[0]
    short = Recorded(monkeypatch, asking.grows)  # its own answer ends with the first token
    row = pack([dialogue(2, clips=1)])
    assert short.lockstep.answer(row, [], bool(options), NEW, first) == ([], [])
    assert short.calls == asking.calls


def test_no_answer_is_generated_where_no_rank_asks_for_one(monkeypatch):
    recorded = Recorded(monkeypatch)
    tokens, logprobs = recorded.lockstep.answer(pack([dialogue(3)]), OPTIONS, True, 0, STOP)
    assert tokens == [] and len(logprobs) == len(OPTIONS) and len(recorded.calls) == 2
