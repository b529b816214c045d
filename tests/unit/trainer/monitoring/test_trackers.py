"""Trackers: a run goes on at its speed beside one that fails, and logs that once; ids stay; no secret is sent.

The trackers are classes of a stand-in for accelerate, in processes as those of a run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from pathlib import Path

import pytest

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.monitoring import trackers
from framestream.trainer.monitoring.logger import MetricsLogger
from framestream.trainer.monitoring.tracker_process import describe_fault
from framestream.trainer.monitoring.trackers import (
    RunIds,
    close_trackers,
    missing_trackers,
    open_trackers,
    shown_settings,
    tracker_options,
)
from tests.helpers.model.manifests import manifest

#: a tracker that keeps its calls in the file SEEN, and at the call WHERE raises or waits
STAND_IN = """
import json, os, sys, time, types

class Tracker:
    def __init__(self, project, **options):
        self._does("init", project, options)
        self.tracker = types.SimpleNamespace(info=types.SimpleNamespace(run_id="given-by-the-server"))

    def _does(self, call, *values):
        with open(os.environ["SEEN"], "a") as seen:
            seen.write(json.dumps([call, *values]) + "\\n")
        print("a line of the library")
        where, _, what = os.environ.get("TROUBLE", "").partition(" ")
        if where == call:
            if what == "exit":
                sys.exit(3)
            if what == "abort":
                os.abort()
            while what == "hang":
                time.sleep(0.01)
            raise RuntimeError("no network\\nat https://me:pass@host?key=1 for " + os.environ["MY_API_KEY"])

    def start(self):
        self._does("start", sorted(set(os.environ) & {"RANK", "LOCAL_RANK"}))

    def store_init_configuration(self, values):
        self._does("settings", values)

    def log(self, values, step=None):
        self._does("log", values, step)

    def finish(self):
        self._does("finish")

LOGGER_TYPE_TO_CLASS = {name: Tracker for name in ("mlflow", "swanlab", "trackio", "wandb")}
"""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "stand_in" / "accelerate"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tracking.py").write_text(STAND_IN)
    (package / "state.py").write_text("class PartialState: ...")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("MY_API_KEY", "k3y-of-mine")
    monkeypatch.setenv("LOCAL_RANK", "0")


def run_with(*names: str, run: Path) -> Manifest:
    made = manifest()
    train = dataclasses.replace(made.train, trackers=names)
    run.mkdir(exist_ok=True)
    return dataclasses.replace(made, name="stage3", train=train)


def seen(folder: Path) -> list[list]:
    return [json.loads(line) for line in (folder / "seen").read_text().splitlines()]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_every_step_arrives_in_order_and_the_run_goes_on_later(tmp_path, caplog, capfd):
    made = run_with("wandb", run=tmp_path / "run")
    for first in (1, 30):
        opened = open_trackers(made, tmp_path / "run")
        for step in range(first, first + 29):
            opened[0].log({"loss": 1 / step}, step)
        close_trackers(opened)
    calls = seen(tmp_path)
    run_id = calls[0][2].pop("id")
    assert calls[0] == [
        "init",
        "framestream",
        {"name": "stage3", "resume": "allow", "dir": str(tmp_path / "run")} | {"settings": {"console": "off"}},
    ]
    assert calls[1] == ["start", []] and calls[2][0] == "settings" and calls[2][1]["train.connector.lr"] == 1e-5
    assert calls[3:32] == [["log", {"loss": 1 / step}, step] for step in range(1, 30)] and calls[32] == ["finish"]
    assert calls[33][2]["id"] == run_id and [call[0] for call in calls[33:]] == [
        "init",
        "start",
        *["log"] * 29,
        "finish",
    ]
    assert RunIds(tmp_path / "run").get("wandb") == run_id and warnings(caplog) == []
    assert (tmp_path / "run" / "trackers.log").read_text().count("a line of the library") == len(calls)
    assert capfd.readouterr().out == ""


def test_a_server_may_choose_the_id(tmp_path):
    made = run_with("mlflow", run=tmp_path / "run")
    for _ in range(2):
        close_trackers(open_trackers(made, tmp_path / "run"))
    first, second = (call[2] for call in seen(tmp_path) if call[0] == "init")
    assert "run_id" not in first and second["run_id"] == "given-by-the-server"


@pytest.mark.parametrize("moment", ["start", "log", "finish"])
@pytest.mark.parametrize("what", ["raise", "exit", "abort"])
def test_a_tracker_that_fails_costs_one_line(tmp_path, caplog, monkeypatch, moment, what):
    monkeypatch.setenv("TROUBLE", f"{moment} {what}")
    opened = open_trackers(run_with("trackio", run=tmp_path / "run"), tmp_path / "run")
    metrics = MetricsLogger(tmp_path / "run", "stage", 0, 9, opened)
    for step in range(5):
        opened[0].log({"loss": 1.0}, step)
    metrics.close()
    opened[0].log({"loss": 1.0}, 6)
    (line,) = warnings(caplog)
    reason = {"raise": "RuntimeError: no network at https://***@host?*** for ***", "exit": "SystemExit: 3"}
    assert line.startswith(f"train.trackers: trackio: {reason.get(what, 'its process ended with status -6')}; it gets")
    assert line.endswith("trackers.log has its messages; the run goes on") and "\n" not in line
    messages = (tmp_path / "run" / "trackers.log").read_text()
    reason = {"raise": "RuntimeError: no network\nat https://***@host?*** for ***", "exit": "SystemExit: 3"}
    assert reason.get(what, "Fatal Python error: Aborted") in messages and f" in {moment}\n" in messages
    assert what == "abort" or "trackio: Traceback (most recent call last):\n" in messages
    assert "k3y-of-mine" not in messages


def test_a_process_that_cannot_start_is_named(tmp_path, caplog, monkeypatch):
    """Its log says nothing, so the warning does not name it."""
    monkeypatch.setattr(trackers.sys, "executable", str(tmp_path / "no-python"))
    close_trackers(open_trackers(run_with("wandb", run=tmp_path / "run"), tmp_path / "run"))
    (line,) = warnings(caplog)
    assert "No such file or directory" in line and line.endswith("'; it gets no more figures; the run goes on")


@pytest.mark.parametrize("moment", ["init", "start", "log", "finish"])
def test_a_tracker_that_hangs_neither_slows_nor_keeps_a_run(tmp_path, caplog, monkeypatch, moment):
    monkeypatch.setenv("TROUBLE", f"{moment} hang")
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.5)
    monkeypatch.setattr(trackers, "MAX_WAITING", 10)
    opened = open_trackers(run_with("swanlab", run=tmp_path / "run"), tmp_path / "run")
    for step in range(100 if moment != "finish" else 5):
        opened[0].log({}, step)
    close_trackers(opened)
    (line,) = warnings(caplog)
    assert line.startswith("train.trackers: swanlab: ") and line.endswith("the run goes on")
    assert ("has not ended in" if moment == "finish" else "10 steps wait for it") in line
    opened[0]._thread.join(10)
    assert opened[0]._process.wait(10) < 0  # nothing is left behind


def test_a_tracker_ends_with_a_trainer_that_was_killed(tmp_path):
    opened = open_trackers(run_with("wandb", run=tmp_path / "run"), tmp_path / "run")
    opened[0].log({"loss": 1.0}, 1)
    while not (tmp_path / "seen").exists() or '["log"' not in (tmp_path / "seen").read_text():
        time.sleep(0.01)
    opened[0]._process.stdin.close()  # as the system does
    assert opened[0]._process.wait(10) == 0 and seen(tmp_path)[-1] == ["finish"]


def test_ids_that_cannot_be_read_are_named_and_replaced(tmp_path, caplog):
    ids = RunIds(tmp_path)
    ids.set("wandb", "0123abcd")
    assert (RunIds(tmp_path).get("wandb"), ids.get("mlflow")) == ("0123abcd", None) and not caplog.records
    (tmp_path / "trackers.json").write_text('{"wandb": "../../x"}')
    assert RunIds(tmp_path).get("wandb") is None
    (tmp_path / "trackers.json").write_text('{"wan')
    assert RunIds(tmp_path).get("wandb") is None
    assert "trackers.json" in warnings(caplog)[-1] and "new runs are started" in warnings(caplog)[-1]


def test_files_of_a_tracker_are_in_the_folder_of_the_run(tmp_path):
    made = run_with(run=tmp_path / "run")
    for name in ("swanlab", "wandb"):
        options = tracker_options(name, made, tmp_path / "run", "0123456789abcdef", True)
        assert options["id"] == "0123456789abcdef"
        assert [value for value in options.values() if str(value).startswith(str(tmp_path / "run"))]
    assert tracker_options("trackio", made, tmp_path, "0123456789abcdef", False)["name"] == "stage3-01234567"


def test_a_tracker_that_is_not_installed_is_named_with_the_fix(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path / "stand_in")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "absent").mkdir()  # W&B keeps its files in a folder of this kind in the current folder
    (line,) = missing_trackers(["absent"])
    assert line == "train.trackers: absent: not installed; pip install absent, or remove it"
    assert list(missing_trackers(["accelerate"])) == []
    monkeypatch.setattr(trackers, "PACKAGES", ("absent_too",))
    (line,) = missing_trackers(["accelerate"])
    assert "pip install absent_too," in line


def test_neither_keys_nor_places_are_told(monkeypatch):
    monkeypatch.setenv("SOME_PASSWORD", "p4ss")
    error = ValueError("401 for https://me:pass@host/api?token=abc&x=1 with p4ss\nand more")
    assert describe_fault(error) == "ValueError: 401 for https://***@host/api?*** with *** and more"
    made = manifest()
    made = dataclasses.replace(made, output="/secret/run", shards="https://host/x?sig=secret", name="s")
    settings = shown_settings(made)
    assert settings["train.connector.lr"] == 1e-5 and settings["batching.global_batch"] == 256
    assert not [name for name, value in settings.items() if "secret" in str(value) or "tokenizer" in name]
    sections = {name.partition(".")[0] for name in settings}
    assert not sections & {"data", "shards", "output", "init_from", "mix", "loader"}
    assert "RANK" not in trackers._environment() and os.environ["LOCAL_RANK"] == "0"
