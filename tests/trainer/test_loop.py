"""What the loop draws at random: a function of the row alone, so that a resumed run draws the same."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from trainer import loop
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

    def get_global_grad_norm(self) -> float:
        return 1.0

    def zero_optimization_stage(self) -> int:
        return 3


def draws(steps: range, rank: int, world: int, seed: int = 0, micros: int = 2) -> list[float]:
    """What rank ``rank`` draws in these global batches of ``micros`` rows on every rank."""

    def row(step: int, micro: int) -> SimpleNamespace:
        batch = SimpleNamespace(epoch=step // 4, step=step % 4, micro=micro, micros=micros, last=micro == micros - 1)
        batch.__dict__.update(keys=["a"], skipped=[], tokens=1, frames=1, total_weight=1.0, to=lambda device: batch)
        return batch

    place = Place(rank, world, torch.device("cpu"))
    heart = SimpleNamespace(doing=lambda what: None)
    engine, rows = Engine(), iter([row(step, micro) for step in steps for micro in range(micros)])
    for _ in steps:
        loop._global_batch(engine, rows, place, RunLedger(Path(), rank), seed, heart)
    return engine.drawn


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(loop, "total", lambda values, place: values)


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
