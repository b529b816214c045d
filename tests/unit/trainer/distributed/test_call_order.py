"""Ranks that call the model differently get an error that names the first call that differs.

The same two ranks open shards, for which rank 0 takes longer than the limit.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from framestream.trainer.distributed.call_order import ModuleCallTracer
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def test_two_ranks_compare_their_calls(tmp_path: Path) -> None:
    worker = str(ROOT / "tests/helpers/workers/calls_worker.py")
    corpus.run("torchrun", "--standalone", "--nproc_per_node", "2", worker, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert first["equal"] == first["equal again"] == ""
    assert "call 2 of a global batch is tower on rank 1 and no call on rank 0, of 2 and 1 calls" in first["more"]
    assert "call 1 of a global batch is head.0 on rank 1 and tower on rank 0, of 3 and 3 calls" in first["other order"]
    assert "call 1 of a global batch is no call on rank 1 and tower on rank 0" in first["none"]
    assert first["slow"] == "by rank 0" and first["failing"] == "stage2: damaged"


def test_the_last_call_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    tracer = ModuleCallTracer(model)
    assert tracer.last_call() == "call 0, no call"
    model(torch.zeros(1, 4))
    assert tracer.last_call() == "call 2, 2"
