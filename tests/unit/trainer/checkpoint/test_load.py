"""What DeepSpeed and torch raise about damaged files of a checkpoint becomes one line."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from deepspeed.utils import zero_to_fp32

from framestream.trainer.checkpoint.load import MAX_WORKERS, count_workers, separate_step_counters, trained_weights
from framestream.trainer.checkpoint.state import CheckpointError


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Trying to resize storage that is not resizable"),
        RuntimeError("PytorchStreamReader failed reading zip archive: not a ZIP archive"),
        IndexError("pop from empty list"),
        KeyError("17"),
        struct.error("unpack requires a buffer of 4 bytes"),
        pickle.UnpicklingError("Unsupported operand 149"),
        EOFError(),
    ],
    ids=lambda error: f"{type(error).__name__}-{str(error)[:12]}",
)
def test_damaged_files_are_one_line_with_the_folder(monkeypatch, tmp_path: Path, error: Exception):
    monkeypatch.setattr(zero_to_fp32, "get_fp32_state_dict_from_zero_checkpoint", raises(error))
    with pytest.raises(CheckpointError) as caught:
        trained_weights(tmp_path / "step-000001")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'step-000001'}: cannot be read (") and "\n" not in message
    assert message.endswith("; use another checkpoint of the run")


@pytest.mark.parametrize(
    "reason", ["[third_party/gloo/tcp/pair.cc:1] reset", "DefaultCPUAllocator: can't allocate memory"]
)
def test_lost_ranks_and_memory_are_no_fault_of_the_files(monkeypatch, tmp_path: Path, reason: str):
    monkeypatch.setattr(zero_to_fp32, "get_fp32_state_dict_from_zero_checkpoint", raises(RuntimeError(reason)))
    with pytest.raises(RuntimeError) as caught:
        trained_weights(tmp_path / "step-000001")
    assert str(caught.value) == reason


@pytest.mark.parametrize("fused", [True, False])
def test_every_parameter_counts_steps_on_its_own_device(fused: bool):
    """Fused AdamW takes the counter from the device of the moments. A checkpoint may have one for all, elsewhere."""
    weights = [torch.nn.Parameter(torch.zeros(2, device="meta")) for _ in range(2)]
    optimizer = torch.optim.AdamW(weights)
    optimizer.param_groups[0]["fused"] = fused
    shared = torch.tensor(7.0)
    for weight in weights:
        optimizer.state[weight] = {"step": shared, "exp_avg": torch.zeros_like(weight)}
    separate_step_counters(optimizer)
    counters = [moments["step"] for moments in optimizer.state.values()]
    assert {counter.device.type for counter in counters} == {"meta" if fused else "cpu"}
    assert len({id(shared), *map(id, counters)}) == 3


def test_a_conversion_uses_all_cores_and_at_most_half_the_memory(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert count_workers(1) == 8 and count_workers(10**15) == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(256)))
    assert count_workers(1) == MAX_WORKERS


def raises(error: Exception):
    def call(*positional, **named):
        raise error

    return call
