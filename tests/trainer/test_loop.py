"""One optimiser step: what is drawn at random, a function of the row alone, and what the log shows."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.batch import Batch
from tests.trainer.model.rows import SIZE, SMALL, dialogue, pack
from tests.trainer.model.test_cost import manifest
from trainer import loop, tally
from trainer.distributed import Place
from trainer.run_ledger import RunLedger


class Engine:
    """Stands for DeepSpeed's: draws once in every row and keeps what it drew."""

    def __init__(self) -> None:
        self.drawn: list[float] = []

    def __call__(self, row) -> torch.Tensor:
        self.drawn.append(torch.rand(()).item())
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


def draws(steps: range, rank: int, world: int, seed: int = 0, micros: int = 2) -> list[float]:
    """What rank ``rank`` draws in these global batches of ``micros`` rows on every rank."""

    def row(step: int, micro: int) -> Batch:
        batch = dataclasses.replace(pack([dialogue(0, text=3)]), epoch=step // 4, step=step % 4, micro=micro)
        return dataclasses.replace(batch, micros=micros, last=micro == micros - 1)

    settings = dataclasses.replace(manifest(SIZE, SMALL), seed=seed)
    engine, rows = Engine(), iter([row(step, micro) for step in steps for micro in range(micros)])
    for _ in steps:
        loop._global_batch(engine, rows, Place(rank, world, torch.device("cpu")), RunLedger(Path(), rank), settings)
    return engine.drawn


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in ("total", "largest"):
        monkeypatch.setattr(tally, name, lambda values, place: values)


def test_a_resumed_run_draws_what_it_would_have_drawn():
    straight = draws(range(6), rank=1, world=2)
    torch.rand(5)
    assert draws(range(3, 6), rank=1, world=2) == straight[6:]


def test_a_row_draws_the_same_on_whatever_rank_it_is_computed():
    (first, second), alone = (draws(range(3), rank, 2) for rank in (0, 1)), draws(range(3), 0, 1, micros=4)
    assert alone == [value for pair in zip(first, second, strict=True) for value in pair]


def test_rows_steps_epochs_and_seeds_draw_differently():
    drawn = [value for rank in (0, 1) for seed in (0, 1) for value in draws(range(8), rank, 2, seed)]
    assert len(set(drawn)) == len(drawn) == 64
