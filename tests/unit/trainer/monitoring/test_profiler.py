"""The profiler records the steps that the manifest names, and no others."""

from __future__ import annotations

import dataclasses
import gzip
import json

import torch

from framestream.trainer.monitoring.profiler import Profiler
from tests.helpers.model.manifests import manifest


def run(folder, steps: int, **options: int) -> None:
    profiler = Profiler(folder, dataclasses.replace(manifest().train, **options), steps)
    for step, operation in enumerate((torch.sin, torch.cos, torch.tan, torch.exp)[:steps], 1):
        profiler.start_step(step)
        operation(torch.ones(8))
        profiler.end_step(step)


def test_the_named_steps_are_recorded(tmp_path):
    run(tmp_path, 4, profile_step=2, profile_steps=2)
    with gzip.open(tmp_path / "profile" / "steps-000002-000003.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::cos", "aten::tan"} <= names and not {"aten::sin", "aten::exp"} & names
    assert "aten::cos" in (tmp_path / "profile" / "steps-000002-000003.txt").read_text()


def test_a_run_that_ends_earlier_still_writes_the_files(tmp_path):
    run(tmp_path, 3, profile_step=3, profile_steps=5)
    assert (tmp_path / "profile" / "steps-000003-000003.json.gz").exists()


def test_without_a_named_step_nothing_is_written(tmp_path):
    run(tmp_path, 4)
    assert not list(tmp_path.iterdir())
