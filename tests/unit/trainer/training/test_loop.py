"""The loop gives every row its drop-path numbers, which depend only on its dialogues."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framestream.pipeline.config.training import EvaluateConfig
from framestream.trainer import __main__ as trainer_command
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.monitoring import step_stats
from framestream.trainer.monitoring.run_ledger import RunLedger
from framestream.trainer.training import loop, validation
from framestream.trainer.training.best_score import BestScore
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


class Losses:
    """Stands for a validation: the loss of every second step is the next of ``losses``."""

    def __init__(self, losses: list[float], patience: int) -> None:
        self.losses, self.best = iter(losses), BestScore(EvaluateConfig(every=2, patience=patience))

    is_due, needs_checkpoint = validation.Validation.is_due, validation.Validation.needs_checkpoint
    _manifest = SimpleNamespace(evaluate=EvaluateConfig(every=2))

    def run(self, engine, record: dict, watchdog, preemption) -> dict:
        loss = next(self.losses)
        self.best.add(record["step"], {"loss": loss})
        return {"val_loss": loss}

    def describe_stop(self, step: int, steps: int) -> str:
        return f"stopped early after step {step} of {steps}"


def steps_of(tmp_path, monkeypatch, stub, done: int = 0) -> list[int]:
    """Run the steps of a run of 12 that saves every 5; return those that were saved."""
    saved: list[int] = []
    figures = dict.fromkeys(
        ("loss", "tokens_per_s", "frames_per_s", "data_wait", "seconds", "tflops", "grad_norm"), 1.0
    )
    figures |= {"applied": True, "peak_memory": 1, "skipped": 0, "mfu": None}
    monkeypatch.setattr(loop, "_global_batch", lambda run, rows: dict(figures))
    monkeypatch.setattr(loop, "set_learning_rates", lambda *_: {})
    monkeypatch.setattr(loop, "_save", lambda run, rows, step: saved.append(step))
    made = manifest(SIZE, SMALL)
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, max_steps=12, save_every=5))
    made = dataclasses.replace(made, name="run")
    loader = Rows([])
    loader.num_batches = 100
    preemption = SimpleNamespace(raise_if_preempted=lambda context: None, deferred=contextlib.nullcontext)
    context = DistributedContext(0, 1, torch.device("cpu"))
    engine, ledger = Engine(0), RunLedger(tmp_path, 0, 1)
    engine.optimizer = None
    run = loop.RunContext(made, engine, context, tmp_path, ledger, preemption, SimpleNamespace(), stub)
    loop._run_steps(run, loader, done)
    return saved


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def test_the_best_steps_are_saved_and_patience_ends_the_run(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "framestream")
    saved = steps_of(tmp_path, monkeypatch, Losses([3.0, 2.0, 2.5, 2.2, 1.0], patience=2))
    assert saved == [2, 4, 5, 8] and "run: stopped early after step 8 of 12" in caplog.text
    assert [(line["step"], line.get("val_loss")) for line in logged(tmp_path)[3:]] == [
        (4, 2.0),
        (5, None),
        (6, 2.5),
        (7, None),
        (8, 2.2),
    ]
    assert steps_of(tmp_path, monkeypatch, None, done=8) == [10, 12]  # the same run, no longer validated


def test_an_interrupted_validation_is_made_up_for_first(tmp_path, monkeypatch):
    stub = Losses([1.0, 2.0, 3.0, 4.0, 5.0], patience=0)
    steps_of(tmp_path, monkeypatch, Losses([9.0] * 6, 0))
    record = logged(tmp_path)[3]
    stub.best.pending = {name: value for name, value in record.items() if name != "val_loss"}
    assert steps_of(tmp_path, monkeypatch, stub, done=4) == [4, 5, 10, 12]
    assert [line["step"] for line in logged(tmp_path)] == list(range(1, 13))
    assert logged(tmp_path)[3] == {**record, "val_loss": 1.0} and stub.best.best_step == 4


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
