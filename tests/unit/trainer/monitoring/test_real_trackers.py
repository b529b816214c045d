"""The real trackers, offline: a run that is resumed goes on under its id, and its figures can be read back."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest

from framestream.trainer.monitoring import trackers
from framestream.trainer.monitoring.trackers import RunIds, close_trackers, open_trackers
from tests.helpers.model.manifests import manifest

pytestmark = pytest.mark.peers


def log_twice(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Log steps 1 to 3, then 4 to 6 as a resumed run does; return the id of the run."""
    pytest.importorskip(name)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 120.0)
    made = manifest()
    train = dataclasses.replace(made.train, trackers=(name,))
    made = dataclasses.replace(made, name="stage3", train=train)
    for first in (1, 4):
        opened = open_trackers(made, run)
        for step in range(first, first + 3):
            opened[0].log({"loss": 1 / step, "lr/connector": 1e-3}, step)
        close_trackers(opened)
    run_id = RunIds(run).get(name)
    assert run_id
    return run_id


@pytest.fixture(autouse=True)
def no_warnings(caplog: pytest.LogCaptureFixture):
    yield
    assert not caplog.records


def test_wandb_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_id = log_twice("wandb", tmp_path, monkeypatch)
    folders = list((tmp_path / "wandb").glob(f"offline-run-*-{run_id}"))
    assert len(folders) == 2 and all(list(folder.glob(f"run-{run_id}.wandb")) for folder in folders)


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path / 'mlruns'}")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_id = log_twice("mlflow", tmp_path, monkeypatch)
    (metric,) = (tmp_path / "mlruns").glob(f"*/{run_id}/metrics/loss")
    points = [line.split() for line in metric.read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step in points] == [(1 / step, step) for step in range(1, 7)]
    assert list((tmp_path / "mlruns").glob(f"*/{run_id}/params/train.connector.lr"))


def test_trackio_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_id = log_twice("trackio", tmp_path, monkeypatch)
    (database,) = (tmp_path / "trackio").glob("framestream.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(name, step) for name, step, _ in rows] == [(f"stage3-{run_id[:8]}", step) for step in range(1, 7)]
    assert [json.loads(metrics)["loss"] for _, _, metrics in rows] == [1 / step for step in range(1, 7)]


def test_swanlab_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_SAVE_DIR", str(tmp_path / "home"))
    run_id = log_twice("swanlab", tmp_path, monkeypatch)
    assert len(list((tmp_path / "swanlog").glob(f"*{run_id}*"))) == 2
