"""The gather of parameters that ZeRO-3 keeps complete, with the collective of a second rank played by the test."""

from __future__ import annotations

import enum
from types import SimpleNamespace

import pytest
import torch

from framestream.trainer.training import persistent_gather
from framestream.trainer.training.persistent_gather import coalesce_gather


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2


def parameter(values: torch.Tensor, calls: list) -> torch.nn.Parameter:
    """A parameter as DeepSpeed leaves it after a step on rank 0 of 2: this rank has the first half."""
    half = (values.numel() + 1) // 2
    padded = torch.cat([values.flatten(), torch.zeros(2 * half - values.numel())])
    made = torch.nn.Parameter(torch.empty(0))
    made.ds_tensor, made.other = padded[:half].clone(), padded[half:]
    made.ds_numel, made.ds_shape, made.ds_status = values.numel(), values.shape, Status.NOT_AVAILABLE
    made.ds_process_group = None
    made.all_gather = lambda params=None, **options: calls.append((params, options))
    return made


@pytest.fixture
def gathered(monkeypatch):
    """Parameters of three shapes, their values, the calls of DeepSpeed's own gather, and of the collective."""
    values = [torch.arange(6.0).view(2, 3), torch.arange(5.0) - 9, torch.tensor([[[7.0]]])]
    own_calls, collectives = [], []
    parameters = [parameter(each, own_calls) for each in values]

    def play(flat, own, group):
        others = torch.cat([p.other for p in parameters if p.ds_status is Status.NOT_AVAILABLE])
        flat.copy_(torch.cat([own, others]))
        collectives.append(len(own))

    fake = SimpleNamespace(get_world_size=lambda group: 2, all_gather_into_tensor=play)
    monkeypatch.setattr(persistent_gather, "dist", fake)
    return parameters, values, own_calls, collectives


def test_one_collective_completes_all_of_them(gathered):
    parameters, values, own_calls, collectives = gathered
    coalesce_gather(parameters)
    parameters[0].all_gather(parameters)
    assert collectives == [3 + 3 + 1] and not own_calls
    for made, wanted in zip(parameters, values, strict=True):
        assert torch.equal(made.data, wanted) and made.data.is_contiguous() and made.ds_status is Status.AVAILABLE
    parameters[0].all_gather(parameters)
    assert len(collectives) == 1, "what is complete is not gathered again"


def test_only_what_is_missing_is_gathered(gathered):
    parameters, values, _, collectives = gathered
    parameters[1].ds_status = Status.AVAILABLE
    coalesce_gather(parameters)
    parameters[0].all_gather(parameters)
    assert collectives == [3 + 1] and torch.equal(parameters[0].data, values[0]) and parameters[1].numel() == 0


def test_other_gathers_stay_those_of_deepspeed(gathered):
    parameters, _, own_calls, collectives = gathered
    coalesce_gather(parameters)
    parameters[0].all_gather(parameters[:2])
    parameters[0].all_gather(parameters, async_op=True)
    assert own_calls == [(parameters[:2], {}), (parameters, {"async_op": True})] and not collectives


def test_quantized_or_mixed_partitions_are_left_alone(gathered):
    parameters, _, own_calls, collectives = gathered
    parameters[2].ds_tensor = parameters[2].ds_tensor.bfloat16()
    coalesce_gather(parameters)
    parameters[0].all_gather(parameters)
    assert len(own_calls) == 1 and not collectives
    coalesce_gather([])
