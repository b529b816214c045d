"""Experiment trackers (``train.trackers``) by accelerate's tracking classes: W&B, trackio, MLflow and SwanLab.

    RUN/trackers.json     the id that the run has at each tracker, so that a resumed run goes on there
    RUN/trackers.log      what their libraries print, and where in them a tracker failed

Each tracker works in a process of its own, which a thread of rank 0 feeds from a queue. The training loop only puts
figures into the queue. A tracker that fails, or that is so slow that its queue is full, costs one warning and its own
figures, and never the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import framestream
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.utils.records import RecordError, read_record, write_record

MODULE = "framestream.trainer.monitoring.tracker_process"
RUN_IDS, MESSAGES = "trackers.json", "trackers.log"
MAX_WAITING = 1000  #: steps in a queue; more are dropped
CLOSE_SECONDS = 10.0  #: for all trackers together, to send what waits at the end of a run
PACKAGES = ("accelerate",)  #: that every tracker needs besides its own
#: variables of launchers, which a process that is no rank must not see
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: sections of the manifest that a tracker gets; the others hold paths and addresses
SHOWN_SECTIONS = ("name", "stage", "seed", "frames", "images", "text", "batching", "model", "train", "evaluate")

logger = logging.getLogger(__name__)


class TrackerError(RuntimeError):
    """A tracker failed; one line with its reason."""


class RunIds:
    """RUN/trackers.json. Trackers may use it from their threads."""

    def __init__(self, run: Path) -> None:
        self._path, self._lock = run / RUN_IDS, threading.Lock()
        self._ids: dict[str, Any] = {}
        try:
            self._ids = read_record(self._path, "list of run ids", "new runs are started at the trackers")
        except FileNotFoundError:
            pass
        except (OSError, RecordError) as error:
            logger.warning("%s", error)

    def get(self, name: str) -> str | None:
        """Return the id that the run has at a tracker, None if it has none yet."""
        found = self._ids.get(name)
        return found if isinstance(found, str) and re.fullmatch(r"[\w-]{1,64}", found, re.ASCII) else None

    def set(self, name: str, run_id: str) -> None:
        """Keep the id that the run has at a tracker."""
        with self._lock:
            self._ids[name] = run_id
            write_record(self._path, self._ids)


class TrackerProcess:
    """A tracker in a process of its own, and the thread that feeds it.

    Args:
        name: of the tracker.
        manifest: of the run.
        run: its folder.
        ids: of the run at trackers.
    """

    def __init__(self, name: str, manifest: Manifest, run: Path, ids: RunIds) -> None:
        self._name, self._ids, self._messages = name, ids, run / MESSAGES
        known = ids.get(name)
        run_id = known or uuid.uuid4().hex[:16]
        self._first = {
            "project": manifest.train.tracker_project,
            "id": run_id,
            "options": tracker_options(name, manifest, run, run_id, known is not None),
            "settings": None if known else shown_settings(manifest),
        }
        self._steps: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(MAX_WAITING)
        self._process: subprocess.Popen[str] | None = None
        self._warned = False
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"tracker_{name}")
        self._thread.start()

    def log(self, figures: dict[str, float], step: int) -> None:
        """Queue the figures of one step; never waits and never raises."""
        if not self._thread.is_alive():
            return
        try:
            self._steps.put_nowait((figures, step))
        except queue.Full:
            self._warn(f"{MAX_WAITING} steps wait for it; it gets no others until it goes on")

    def close(self, end: float) -> None:
        """Let the tracker send what waits, until ``end`` on the clock of ``time.monotonic``, then end its process."""
        with contextlib.suppress(queue.Full):
            self._steps.put(None, timeout=max(0.0, end - time.monotonic()))
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._warn(f"it has not ended in {CLOSE_SECONDS:g} s; its last figures may be missing")
            if self._process:
                with contextlib.suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)  # and what its library has started

    def _work(self) -> None:
        try:
            self._feed()
        except TrackerError as error:
            self._warn(f"{error}; it gets no more figures, {self._messages} has its messages")
        except (OSError, ValueError) as error:
            self._warn(f"{' '.join(str(error).split())}; it gets no more figures")

    def _feed(self) -> None:
        """Start the process, and send it all steps until the run ends."""
        with open(self._messages, "ab") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", MODULE, self._name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                env=_environment(),
                text=True,
                start_new_session=True,  # Ctrl-C reaches the trainer, which ends it
            )
        process = self._process
        assert process.stdin and process.stdout
        try:
            print(json.dumps(self._first), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline() or "{}")
            if "id" in answer:
                self._ids.set(self._name, str(answer["id"]))
                while step := self._steps.get():
                    print(json.dumps(step), file=process.stdin, flush=True)
            process.stdin.close()
        except BrokenPipeError:  # it has ended, and says why
            answer = {}
        fault = json.loads(process.stdout.readline() or "{}") if "fault" not in answer else answer
        if process.wait():
            raise TrackerError(fault.get("fault") or f"its process ended with status {process.returncode}")

    def _warn(self, reason: str) -> None:
        """Log the first reason why figures are missing."""
        if not self._warned:
            self._warned = True
            logger.warning("train.trackers: %s: %s; the run goes on", self._name, reason)


def missing_trackers(names: Sequence[str]) -> Iterator[str]:
    """Yield a fault for each tracker of ``train.trackers`` that is not installed."""
    for name in names:
        if missing := [package for package in (*PACKAGES, name) if not _is_installed(package)]:
            yield f"train.trackers: {name}: not installed; pip install {' '.join(missing)}, or remove it"


def _is_installed(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a mere folder, such as ./wandb of W&B's files, has no origin


def open_trackers(manifest: Manifest, run: Path) -> list[TrackerProcess]:
    """Start the trackers of ``train.trackers``; only rank 0 calls this."""
    ids = RunIds(run) if manifest.train.trackers else None
    return [TrackerProcess(name, manifest, run, ids) for name in manifest.train.trackers if ids]


def close_trackers(trackers: Sequence[TrackerProcess]) -> None:
    """End all trackers, within :data:`CLOSE_SECONDS`."""
    end = time.monotonic() + CLOSE_SECONDS
    for tracker in trackers:
        tracker.close(end)


def tracker_options(name: str, manifest: Manifest, run: Path, run_id: str, is_known: bool) -> dict[str, Any]:
    """Return the keywords of one of accelerate's trackers: the name and id of the run, and where its files go.

    Servers, modes and keys come from each tracker's own environment variables.
    """
    title, folder = manifest.name, str(run.absolute())
    if name == "wandb":
        return {"id": run_id, "name": title, "resume": "allow", "dir": folder, "settings": {"console": "off"}}
    if name == "mlflow":
        return {"run_name": title, **({"run_id": run_id} if is_known else {})}
    if name == "trackio":  # a run has no id there: its name is that of one run
        return {"name": f"{title}-{run_id[:8]}", "resume": "allow"}
    return {"id": run_id, "name": title, "resume": "allow", "log_dir": f"{folder}/swanlog"}


def shown_settings(manifest: Manifest) -> dict[str, str | float | int | bool]:
    """Return the settings that a tracker gets: ``field.field`` -> value. None of them is a path or an address."""
    values = {name: value for name, value in to_dict(manifest).items() if name in SHOWN_SECTIONS}
    values["text"] = {name: value for name, value in values["text"].items() if name != "tokenizer"}
    return dict(_flatten(values))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | float | int | bool]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, (bool, int, float, str)) else str(value)


def _environment() -> dict[str, str]:
    """Return the environment of a tracker's process: no rank, no GPU, and this project's packages."""
    values = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    own = str(Path(framestream.__file__).absolute().parents[1])
    paths = filter(None, [*values.get("PYTHONPATH", "").split(os.pathsep), own])
    return {**values, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(paths)}
