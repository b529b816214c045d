"""Statistics of a global batch, computed by hand."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.model.cost import row_flops
from framestream.trainer.monitoring import step_stats
from framestream.trainer.monitoring.step_stats import StepStats
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack

INF = float("inf")


def stats_of(monkeypatch, losses: list[float], ranks: int = 1) -> StepStats:
    """Statistics of two rows, which arrive after 2 and 1 s and take 3 s each; all ranks have the same rows."""
    now = iter([0.0, 2.0, 5.0, 6.0, 10.0])
    monkeypatch.setattr(step_stats, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    monkeypatch.setattr(step_stats, "all_gather", lambda values, context: values.repeat(ranks, 1))
    monkeypatch.setattr(step_stats, "peak_memory", lambda device: 12345)
    settings = manifest(SIZE, SMALL)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, peak_tflops=1e-6))
    rows = [pack([dialogue(0, clips=2), dialogue(1, text=30)]), pack([dialogue(2, stills=3, text=5)])]
    stats = StepStats(settings, DistributedContext(0, ranks, torch.device("cpu")))
    for row, keys, loss in zip(rows, (["a", "b"], ["c"]), losses, strict=True):
        stats.end_wait()
        skipped = [("lost", "gone")] if keys == ["c"] else []
        stats.add(dataclasses.replace(row, keys=keys, skipped=skipped, total_weight=4.0), torch.tensor(loss))
        if keys == ["a", "b"]:
            stats.start_wait()
    stats.all_reduce()
    return stats


def test_rates_shares_and_mfu(monkeypatch):
    record = stats_of(monkeypatch, [6.0, 2.0], ranks=2).to_dict()
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


def test_the_dialogues_of_not_finite_rows_are_named(monkeypatch):
    stats = stats_of(monkeypatch, [1.0, INF])
    assert stats.not_finite() == [("c", "the loss of its row is inf")]
    assert not math.isfinite(stats.loss)


def test_a_not_finite_gradient_names_all_dialogues(monkeypatch):
    assert [key for key, _ in stats_of(monkeypatch, [1.0, 2.0]).not_finite()] == ["a", "b", "c"]


def test_the_digest_does_not_depend_on_the_order(monkeypatch):
    digests = {stats_of(monkeypatch, [1.0, 2.0]).to_dict()["batch"] for _ in range(2)}
    assert len(digests) == 1
    digest = step_stats._digest
    assert digest(["a", "b", "c"]) == digest(["c", "a", "b"]) != digest(["a", "b", "d"])
