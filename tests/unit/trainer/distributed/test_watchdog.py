"""The watchdog: which rank is named, when, and that a run with a stopped rank ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from framestream.trainer.distributed.watchdog import BEATS, Heartbeat, StallDetector
from tests.helpers.corpora import training_corpus as corpus

LIMIT = 0.5  #: minutes


def beat(number: int, phase_count: int, phase: str = "working") -> Heartbeat:
    return Heartbeat(number, phase_count, phase, f"host, process {number}")


def first_fault(detector: StallDetector, beats, intervals: int) -> tuple[int, str] | None:
    """Return the first interval, of 1 s, with a fault, and the fault; ``beats(i)`` are the heartbeats of interval i."""
    for i in range(intervals):
        if fault := detector.check(beats(i)):
            return i, fault
    return None


def test_ranks_that_make_progress_are_never_named():
    for rank in range(3):
        detector = StallDetector(rank, 60, 1)
        assert first_fault(detector, lambda i: [beat(i, i // 20) for _ in range(3)], 500) is None


def test_a_silent_rank_is_named_after_half_the_limit():
    def beats(i):
        return [beat(i, 7, "backward pass"), beat(3, 7, "forward pass"), beat(i, 7)]

    when, what = first_fault(StallDetector(0, 60, 1), beats, 100)
    assert when == 30 and "no sign of life for 30 s from rank 1 (host, process 3, forward pass)" in what
    later, _ = first_fault(StallDetector(2, 60, 1), beats, 100)
    assert when < later < when + 5  # rank 0 reports for all


def test_a_silent_rank_is_ignored_if_this_one_makes_progress():
    assert first_fault(StallDetector(0, 60, 1), lambda i: [beat(i, i // 9), beat(3, 7)], 200) is None


def test_a_late_rank_is_named_with_its_phase():
    def beats(i):
        return [beat(i, 9, "forward pass"), beat(i, 9, "forward pass"), beat(i, 8, "waiting for data")]

    when, what = first_fault(StallDetector(0, 60, 1), beats, 100)
    assert when == 54 and "rank 2" in what and "waiting for data" in what and "rank 1" not in what


def test_at_most_three_of_the_late_ranks_are_named():
    when, what = first_fault(
        StallDetector(0, 60, 1), lambda i: [beat(i, 9, f"forward {rank}") for rank in range(5)], 100
    )
    assert when == 54 and "check_calls" in what and "2 more" in what
    assert all(f"rank {rank} (host" in what for rank in range(3))


def test_a_phase_without_a_deadline_ends_only_with_silence():
    """Rank 0 converts a checkpoint, however long that takes."""

    def beats(i, silent=False):
        return [replace(beat(3 if silent else i, 5), no_deadline=True), replace(beat(i, 5), no_deadline=True)]

    assert first_fault(StallDetector(1, 60, 1), beats, 500) is None
    _, what = first_fault(StallDetector(1, 60, 1), lambda i: beats(i, silent=True), 100)
    assert "no sign of life" in what and "rank 0" in what


def test_a_job_that_was_suspended_is_not_aborted():
    """No clock is read: an interval counts as one, however long it lasted."""
    detector = StallDetector(0, 60, 1)
    assert first_fault(detector, lambda i: [beat(1, 7), beat(1, 7)], 29) is None
    assert first_fault(detector, lambda i: [beat(2 + i, 8 + i), beat(2 + i, 8 + i)], 100) is None


def ranks_of_a_run(manifest: Path, run: Path) -> list[subprocess.Popen]:
    """Start two ranks without a launcher, which would kill the stopped rank 30 seconds after the other ended."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**corpus.environment(), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    assigned = (f"output={run}", f"train.timeout_minutes={LIMIT}", "train.epochs=50", "train.save_every=1000")
    settings = [word for assignment in assigned for word in ("--set", assignment)]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "trainer", "--manifest", str(manifest), *settings],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=corpus.PROJECT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"), videos=2)


@pytest.mark.slow
def test_a_stopped_rank_is_named_and_the_run_ends(manifest: Path, tmp_path: Path) -> None:
    """Also rank 0, which hosts the store if there is no launcher. Both runs at the same time."""
    runs = {stopped: ranks_of_a_run(manifest, tmp_path / str(stopped)) for stopped in (0, 1)}
    try:
        for stopped, ranks in runs.items():
            log = tmp_path / str(stopped) / "log.jsonl"
            while all(rank.poll() is None for rank in ranks) and not (log.exists() and log.stat().st_size):
                time.sleep(0.05)
            time.sleep(3 * LIMIT * 60 / BEATS)  # the other rank has a heartbeat of a step
            ranks[stopped].send_signal(signal.SIGSTOP)
        for stopped, ranks in runs.items():
            other = ranks[1 - stopped]
            _, errors = other.communicate(timeout=LIMIT * 60)
            assert other.returncode == 1
            (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
            assert "no sign of life" in line and f"rank {stopped} (" in line
            assert f"process {ranks[stopped].pid}" in line
            assert "global batch" in line or "waiting for data" in line
    finally:
        for rank in (rank for ranks in runs.values() for rank in ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
            rank.wait()
