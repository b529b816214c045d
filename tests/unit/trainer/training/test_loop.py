"""What the loop hands to the engine: every row with its random numbers, those of its dialogues alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.monitoring import step_stats as tally
from framestream.trainer.monitoring.run_ledger import RunLedger
from framestream.trainer.training import loop
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack


class Engine:
    """Stands for DeepSpeed's: keeps the random numbers of every clip, by dialogue."""

    def __init__(self, draws: int) -> None:
        self.module = SimpleNamespace(vision_tower=SimpleNamespace(num_drop_path_rands=draws))
        self.drawn: dict[tuple[int, str], torch.Tensor | None] = {}

    def __call__(self, row) -> torch.Tensor:
        for number, key in enumerate(row.keys):  # one clip each
            self.drawn[row.step, key] = None if row.drop_path_rand is None else row.drop_path_rand[number]
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


def drawn(rows: list[list[str]], steps: range = range(2), seed: int = 0, draws: int = 4) -> dict:
    """The numbers of every global batch and dialogue where its dialogues stand in these ``rows`` of one rank."""

    def row(step: int, micro: int):
        batch = pack([dialogue(number, clips=1) for number in range(len(rows[micro]))])
        batch.keys, batch.step, batch.micro_step = rows[micro], step, micro
        batch.num_micro_steps, batch.is_last = len(rows), micro == len(rows) - 1
        return batch

    engine = Engine(draws)
    upcoming = iter([row(step, micro) for step in steps for micro in range(len(rows))])
    settings = dataclasses.replace(manifest(SIZE, SMALL), seed=seed)
    leave, heart = SimpleNamespace(check=lambda place: None), SimpleNamespace(doing=lambda what: None)
    place = DistributedContext(0, 1, torch.device("cpu"))
    run = loop.RunContext(settings, engine, place, Path(), RunLedger(Path(), 0, 1), leave, heart)
    for _ in steps:
        loop._global_batch(run, upcoming)
    return engine.drawn


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("total", "largest"):
        monkeypatch.setattr(tally, name, lambda values, place: values)


def same(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_dialogue_draws_the_same_in_whatever_row_it_stands():
    together = drawn([["a", "b", "c"]])
    assert same(drawn([["c"], ["a", "b"]]), together) and same(drawn([["b"], ["c"], ["a"]]), together)


def test_a_resumed_run_draws_what_it_would_have_drawn():
    straight = drawn([["a", "b"]], range(4))
    torch.rand(5)
    resumed = drawn([["a", "b"]], range(2, 4))
    assert all(torch.equal(straight[key], numbers) for key, numbers in resumed.items())


def test_dialogues_global_batches_and_seeds_draw_differently():
    numbers = [tuple(found.tolist()) for seed in (0, 1) for found in drawn([["a", "b"]], range(4), seed).values()]
    assert len(set(numbers)) == len(numbers) == 16


def test_towers_that_draw_nothing_are_given_nothing():
    assert set(drawn([["a", "b"]], draws=0).values()) == {None}
