"""What a global batch amounts to, by hand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.model.cost import row_flops
from framestream.trainer.monitoring import step_stats as tally
from framestream.trainer.monitoring.step_stats import StepStats
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack

INF = float("inf")


def tallied(monkeypatch, losses: list[float], ranks: int = 1) -> StepStats:
    """Two rows of this rank, that come after 2 and 1 s and take 3 s each; all ranks have the same."""
    now = iter([0.0, 2.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(tally, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(tally, "all_reduce_sum", lambda values, place: [ranks * value for value in values])
    monkeypatch.setattr(tally, "all_reduce_max", lambda values, place: values)
    monkeypatch.setattr(tally, "peak_memory", lambda device: 12345)
    settings = manifest(SIZE, SMALL)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, peak_tflops=1e-6))
    rows = [pack([dialogue(0, clips=2), dialogue(1, text=30)]), pack([dialogue(2, stills=3, text=5)])]
    made = StepStats(settings, DistributedContext(0, ranks, torch.device("cpu")))
    for row, keys, loss in zip(rows, (["a", "b"], ["c"]), losses, strict=True):
        made.end_wait()
        skipped = [("lost", "gone")] if keys == ["c"] else []
        made.add(dataclasses.replace(row, keys=keys, skipped=skipped, total_weight=4.0), torch.tensor(loss))
        if keys == ["a", "b"]:
            made.start_wait()
    made.all_reduce()
    return made


def test_rates_shares_and_mfu(monkeypatch):
    record = tallied(monkeypatch, [6.0, 2.0], ranks=2).to_dict()
    tokens = (128 + 12) + 30 + (3 * 64 + 5)
    assert record["seconds"] == 10 and record["loss"] == 2 * (6 + 2) / 4
    assert record["tokens_per_s"] == pytest.approx(2 * tokens / 10)
    assert record["frames_per_s"] == pytest.approx(2 * (2 * 4 + 3) / 10)
    assert record["data_wait"] == pytest.approx((2 + 1) / 10) and record["peak_memory"] == 12345
    assert (record["dialogues"], record["skipped"], record["micro_steps"], record["ranks"]) == (6, 2, 2, 2)
    learned = sum(label >= 0 for seed in ({"clips": 2}, {"text": 30}) for label in dialogue(0, **seed).labels[1:])
    flops = row_flops(manifest(SIZE, SMALL), 2, 0, [140, 30], learned)
    learned = sum(label >= 0 for label in dialogue(2, stills=3, text=5).labels[1:])
    flops += row_flops(manifest(SIZE, SMALL), 0, 3, [197], learned)
    assert record["tflops"] == pytest.approx(flops / 10 / 1e12)  # of one rank
    assert record["mfu"] == pytest.approx(flops / 10 / 1e6)


def test_the_dialogues_of_rows_that_are_not_finite_are_named(monkeypatch):
    made = tallied(monkeypatch, [1.0, INF])
    assert made.not_finite() == [("c", "the loss of its row is inf")]
    assert not math.isfinite(made.loss)


def test_all_dialogues_are_named_where_the_gradient_alone_is_not_finite(monkeypatch):
    assert [key for key, _ in tallied(monkeypatch, [1.0, 2.0]).not_finite()] == ["a", "b", "c"]


def test_the_digest_knows_the_dialogues_and_not_their_order(monkeypatch):
    digests = {tallied(monkeypatch, [1.0, 2.0]).to_dict()["batch"] for _ in range(2)}
    assert len(digests) == 1
    assert tally._digest(["a", "b", "c"]) == tally._digest(["c", "a", "b"]) != tally._digest(["a", "b", "d"])
