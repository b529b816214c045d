"""The loop gives every row its drop-path numbers, which depend only on its dialogues."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framestream.trainer import __main__ as trainer_command
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.monitoring import step_stats
from framestream.trainer.monitoring.run_ledger import RunLedger
from framestream.trainer.training import loop
from framestream.trainer.training.device_prefetch import DevicePrefetcher
from framestream.trainer.training.memory_plan import DeviceMemoryError
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack


class Engine:
    """Stands for DeepSpeed's engine. Records the random numbers of every clip, by dialogue."""

    def __init__(self, per_clip: int) -> None:
        self.module = SimpleNamespace(vision_tower=SimpleNamespace(num_drop_path_rands=per_clip))
        self.numbers: dict[tuple[int, str], torch.Tensor | None] = {}

    def __call__(self, row) -> torch.Tensor:
        for index, key in enumerate(row.keys):  # one clip each
            self.numbers[row.step, key] = None if row.drop_path_rand is None else row.drop_path_rand[index]
        return torch.tensor(1.0)

    def set_gradient_accumulation_boundary(self, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self) -> None: ...

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        return 1.0

    def zero_optimization_stage(self) -> int:
        return 3


class Rows(list):
    """Stands for a loader of one epoch."""

    def state_dict(self) -> dict:
        return {"epoch": 0}


def recorded(rows: list[list[str]], steps: range = range(2), seed: int = 0, per_clip: int = 4) -> dict:
    """Run the global batches whose dialogues are in these ``rows`` of one rank; return the numbers they got."""

    def row(step: int, micro: int):
        batch = pack([dialogue(number, clips=1) for number in range(len(rows[micro]))])
        batch.keys, batch.step, batch.micro_step = rows[micro], step, micro
        batch.num_micro_steps, batch.is_last = len(rows), micro == len(rows) - 1
        return batch

    engine = Engine(per_clip)
    loader = Rows(row(step, micro) for step in steps for micro in range(len(rows)))
    settings = dataclasses.replace(manifest(SIZE, SMALL), seed=seed)
    preemption = SimpleNamespace(raise_if_preempted=lambda context: None)
    watchdog = SimpleNamespace(set_phase=lambda phase: None)
    context = DistributedContext(0, 1, torch.device("cpu"))
    run = loop.RunContext(settings, engine, context, Path(), RunLedger(Path(), 0, 1), preemption, watchdog)
    batches = DevicePrefetcher(loop._rows(run, loader), loader.state_dict, context.device)
    for _ in steps:
        loop._global_batch(run, batches)
    batches.close()
    return engine.numbers


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(step_stats, "all_gather", lambda values, context: values.unsqueeze(0))


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_numbers_do_not_depend_on_the_row():
    together = recorded([["a", "b", "c"]])
    assert same(recorded([["c"], ["a", "b"]]), together) and same(recorded([["b"], ["c"], ["a"]]), together)


def test_a_resumed_run_has_the_same_numbers():
    straight = recorded([["a", "b"]], range(4))
    torch.rand(5)
    resumed = recorded([["a", "b"]], range(2, 4))
    assert all(torch.equal(straight[key], numbers) for key, numbers in resumed.items())


def test_numbers_differ_by_dialogue_global_batch_and_seed():
    numbers = [tuple(found.tolist()) for seed in (0, 1) for found in recorded([["a", "b"]], range(4), seed).values()]
    assert len(set(numbers)) == len(numbers) == 16


def test_towers_without_drop_path_get_no_numbers():
    assert set(recorded([["a", "b"]], per_clip=0).values()) == {None}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/tcp/pair.cc:537] Read error: reset\nby peer"), "lost another rank"),
        (torch.distributed.DistStoreError("wait timeout after 1800000ms"), "lost another rank (wait timeout"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."), "has not enough memory (CUDA out"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "not enough memory"),
        (DeviceMemoryError("rank 1 has not enough memory in the forward pass of"), "rank 1 has not enough memory in"),
        (RuntimeError("shapes do not match"), None),
    ],
)
def test_ranks_and_memory_that_fail_are_one_line(monkeypatch, capsys, error, message):
    def fail(manifest):
        raise error

    monkeypatch.setattr(loop, "train", fail)
    monkeypatch.setenv("RANK", "1")
    if message is None:  # a fault of the program keeps its traceback
        with pytest.raises(RuntimeError, match="shapes"):
            trainer_command._train(manifest(SIZE, SMALL))
        return
    assert trainer_command._train(manifest(SIZE, SMALL)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: rank 1 ") and message in said and said.count("\n") == 1
