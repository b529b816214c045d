"""Worker processes: the batches of threads, clear ends, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from framestream.pipeline import build_loader
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading import decode_processes as processes
from framestream.pipeline.loading.decode_processes import DecodeWorkerError
from framestream.pipeline.shards.index import Index
from tests.helpers.corpora.damage import same, spoil
from tests.helpers.corpora.small_root import Root, manifest, mixed_root, turns
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return mixed_root(tmp_path_factory.mktemp("processes"))


def workers(parent: int) -> list[int]:
    """Process numbers of a process's decoding workers."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return sorted(child for child, line in lines.items() if b"framestream.pipeline.loading.decode_worker" in line)


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize(("count", "threads", "bound"), [(1, 1, 1), (2, 2, 1), (3, 1, 64)])
def test_worker_processes_give_the_batches_of_threads(root, count, threads, bound):
    over = {"loader__workers": count, "loader__threads": threads, "loader__prefetch_mb": bound}
    here, there = list(build_loader(manifest(root))), list(build_loader(manifest(root, **over)))
    assert len(here) == len(there) > 8 and all(same(a, b) for a, b in zip(here, there, strict=True))
    assert not workers(os.getpid())


def test_what_cannot_be_read_is_left_out_alike(tmp_path):
    made = Root(tmp_path)
    for number in range(6):
        made.dialogue(turns("<image>\nWhat?", f"{number}."), [made.video(8, 8)])
    folder = made.write()
    for item in made.media[1:3]:
        spoil(folder, item)
    here, there = ([*build_loader(manifest(folder, loader__workers=n))] for n in (0, 2))
    assert sum(len(row.skipped) for row in here) == 2
    assert all(same(a, b) for a, b in zip(here, there, strict=True))


@pytest.mark.parametrize("count", [0, 2])
def test_a_read_that_hangs_is_left_out_and_the_rest_is_read(tmp_path, count):
    """Opening a pipe that nobody writes to never comes back."""
    made = Root(tmp_path)
    for number in range(6):
        made.dialogue(turns("<image>\nWhat?", f"{number}."), [made.video(8, 8)])
    folder = made.write()
    over = {"loader__workers": count, "loader__threads": 1, "loader__read_timeout": 1, "loader__max_unreadable": 3}
    loader = build_loader(manifest(folder, **over))
    hangs = Index.open(folder / "stage2").shard_path(0)
    hangs.unlink()
    os.mkfifo(hangs)
    rows = list(loader)
    skipped = dict(pair for row in rows for pair in row.skipped)
    assert sorted(skipped) == sorted(made.dialogues[number]["key"] for number in (0, 2, 4))
    assert all("train-000000.tar: v" in why and "loader.read_timeout (1 s)" in why for why in skipped.values())
    assert sum(len(row.keys) for row in rows) == 3
    with contextlib.suppress(OSError):  # let the threads that are stuck go
        os.close(os.open(hangs, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_killed_worker_ends_the_run_with_its_name(root, name):
    stream = iter(build_loader(manifest(root, loader__workers=2, loader__prefetch_mb=1)))
    next(stream)
    victim, other = workers(os.getpid())
    os.kill(victim, getattr(signal, name))
    with pytest.raises(
        DecodeWorkerError, match=rf"^decoding worker \d of 2 \(process {victim}\) was ended by {name}, "
    ):
        list(stream)
    assert gone(other)


def test_a_worker_that_says_nothing_is_given_up(root, monkeypatch):
    monkeypatch.setattr(processes, "SILENCE_LIMIT", 3.0)
    stream = iter(build_loader(manifest(root, loader__workers=1, loader__prefetch_mb=1)))
    next(stream)
    (victim,) = workers(os.getpid())
    os.kill(victim, signal.SIGSTOP)
    with pytest.raises(DecodeWorkerError, match=rf"process {victim}\) has sent nothing for 3 s"):
        list(stream)
    assert gone(victim)


def test_a_worker_that_cannot_begin_says_why(root, monkeypatch):
    loader = build_loader(manifest(root, loader__workers=1))
    object.__setattr__(loader._plan.manifest, "shards", "elsewhere")
    with pytest.raises(DecodeWorkerError, match=r"worker 1 of 1 .* failed: elsewhere/stage2: no finished shards here"):
        list(loader)


def test_workers_end_with_the_iterator(root):
    stream = iter(build_loader(manifest(root, loader__workers=2)))
    next(stream)
    assert len(workers(os.getpid())) == 2
    del stream
    assert not workers(os.getpid())


def test_workers_end_with_a_parent_that_is_killed(root, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(to_dict(manifest(root, loader__workers=2, loader__prefetch_mb=1))))
    code = (
        "import sys, time; from framestream.pipeline import build_loader, load_manifest\n"
        "stream = iter(build_loader(load_manifest(sys.argv[1]))); next(stream); print('ready', flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as parent:
        assert parent.stdout.readline() == b"ready\n"
        left = workers(parent.pid)
        assert len(left) == 2
        os.kill(left[0], signal.SIGSTOP)  # even one that cannot look
        parent.kill()
    os.kill(left[0], signal.SIGCONT)
    while not all(map(gone, left)):  # the test's own time limit ends this
        time.sleep(0.05)
