"""Worker processes that crash, hang or fail: what is lost, and that no process remains."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import framestream.tools.builder.worker_pool
from framestream.tools.builder.worker_pool import WorkerPool
from framestream.tools.common.errors import WorkerError
from tests.helpers.paths import ROOT

ITEMS = range(4)  #: of every task


def make_run(folder: Path, trouble: dict[tuple[int, int], str], limit: float):
    """Writes the items of a task that it did not lose to FOLDER/TASK, when it comes to the end. Item -1 stands for what
    comes before the first item."""

    def run(task, lost, careful, report):
        done = []
        if trouble.get((task, -1)) == "hang":
            time.sleep(3600)
        if trouble.get((task, -1)) == "crash" or (trouble.get((task, -1)) == "crash once" and not careful):
            os.kill(os.getpid(), signal.SIGKILL)
        for item in ITEMS:
            report(item, {}, limit)
            what = trouble.get((task, item))
            if item in lost:
                done.append(f"{item}:{lost[item][0]}:{lost[item][1]}")
                continue
            if what == "crash" or (what == "crash once" and not careful):
                os.kill(os.getpid(), signal.SIGSEGV)
            if what == "hang":
                time.sleep(3600)
            if what == "fail":
                raise OSError("no space left")
            done.append(f"{item}:ok")
            report(None, {"media": 1})
        (folder / str(task)).write_text(" ".join(done))

    return run


def run(folder, trouble, workers=2, limit=60.0):
    with WorkerPool(make_run, (folder, trouble, limit), workers) as pool:
        return list(pool.run(range(3)))


def results(folder):
    return [(folder / str(task)).read_text() for task in range(3)]


GOOD = "0:ok 1:ok 2:ok 3:ok"


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_all_tasks_run(tmp_path, workers):
    reports = run(tmp_path, {}, workers)
    assert results(tmp_path) == [GOOD] * 3
    assert sum(report.get("media", 0) for report in reports) == 3 * len(ITEMS)
    assert multiprocessing.active_children() == []


def test_a_crash_costs_its_item_after_a_second_try(tmp_path):
    run(tmp_path, {(1, 2): "crash"})
    assert results(tmp_path) == [GOOD, "0:ok 1:ok 2:crashed:2 3:ok", GOOD]


def test_a_crash_that_does_not_come_again_costs_nothing(tmp_path):
    run(tmp_path, {(1, 2): "crash once"})
    assert results(tmp_path) == [GOOD] * 3


@pytest.mark.slow
def test_a_crash_outside_any_item_is_tried_once_more(tmp_path):
    run(tmp_path, {(1, -1): "crash once"})
    assert results(tmp_path) == [GOOD] * 3
    with pytest.raises(WorkerError, match="ended with exit code -9 outside any item"):
        run(tmp_path, {(1, -1): "crash"})


@pytest.mark.slow
def test_a_hang_outside_any_item_does_not_last(tmp_path, monkeypatch):
    monkeypatch.setattr(framestream.tools.builder.worker_pool, "OUTSIDE_SECONDS", 4.0)
    with pytest.raises(WorkerError, match="ended after 4 s outside any item"):
        run(tmp_path, {(1, -1): "hang"})


def test_a_hang_costs_its_item(tmp_path):
    run(tmp_path, {(0, 1): "hang", (0, 3): "hang"}, limit=1.0)
    assert results(tmp_path) == ["0:ok 1:timeout:1 2:ok 3:timeout:1", GOOD, GOOD]


def test_a_failure_outside_decoding_ends_the_build(tmp_path):
    with pytest.raises(WorkerError, match="OSError: no space left"):
        run(tmp_path, {(1, 0): "fail"}, workers=1)
    assert (tmp_path / "0").exists() and not (tmp_path / "2").exists()
    assert multiprocessing.active_children() == []


def test_workers_end_when_their_parent_is_killed(tmp_path):
    """A worker in an endless item would otherwise go on for an hour."""
    code = (
        "import sys; from pathlib import Path; from tests.unit.tools.builder.test_worker_pool import run\n"
        "if __name__ == '__main__': run(Path(sys.argv[1]), {(0, 0): 'hang', (1, 0): 'hang'}, limit=3600)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    read, write = os.pipe()  # the workers' standard output too: it ends when the last of them has ended
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=write, env=environment)
    os.close(write)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    while len(children.read_text().split()) < 3:  # two workers, and Python's own tracker of shared resources
        assert parent.poll() is None
        time.sleep(0.01)
    parent.kill()
    parent.wait()
    os.set_blocking(read, True)
    assert os.read(read, 1) == b""
    os.close(read)
