"""Locks of folders: who waits, who is refused, and what is left behind."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from framestream.pipeline.utils import locks
from framestream.pipeline.utils.locks import LockError, lock_file, lock_folder


def test_a_second_process_is_refused_in_one_line(tmp_path):
    folder = tmp_path / "run"
    code = (
        "import sys\nfrom pathlib import Path\nfrom framestream.pipeline.utils.locks import LockError, lock_folder\n"
        "try:\n    with lock_folder(Path(sys.argv[1]), 'run.lock', 'run'): print('free')\n"
        "except LockError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(folder)]
    with lock_folder(folder, "run.lock", "run"):
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        owner = f"process {os.getpid()} on {socket.gethostname()}"
        assert answer == f"{folder}: another run is running here ({owner}); wait for it, or stop it\n"
        (folder / "run.lock").write_bytes(b"\xff\n" * 1000)  # not what this module writes
        answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert answer == f"{folder}: another run is running here; wait for it, or stop it\n"
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "free\n"


def test_shared_locks_exclude_only_others(tmp_path):
    with lock_folder(tmp_path, "build.lock", "build", shared=True):
        with lock_folder(tmp_path, "build.lock", "build", shared=True):
            pass
        with (
            pytest.raises(LockError, match="another build is running here"),
            lock_folder(tmp_path, "build.lock", "build"),
        ):
            pass


def test_a_lock_file_that_was_removed_is_not_taken(tmp_path, monkeypatch):
    """The process before removes the file while this one waits for it: the lock of a removed file protects nothing."""
    path, flock, calls = tmp_path / "step.lock", fcntl.flock, []

    def remove_first(file, operation):
        calls.append(operation)
        if len(calls) == 1:
            path.unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with lock_file(path, "build", wait=True), pytest.raises(LockError), lock_file(path, "build"):
        pass
    assert len(calls) == 3


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_named(tmp_path, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    fix = f"{tmp_path}: .* mount it with flock"
    with pytest.raises(LockError, match=fix), lock_file(tmp_path / "run.lock", "run"):
        pass


def test_folders_that_stay_empty_are_removed(tmp_path):
    folder = tmp_path / "a" / "b"
    with lock_folder(folder, "run.lock", "run"):
        (folder / "run.lock").unlink()
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    file = tmp_path / "out"
    file.write_text("x")
    for folder in (file, file / "below"):
        with pytest.raises(LockError, match=str(folder)) as caught, lock_folder(folder, "run.lock", "run"):
            pass
        assert "choose another folder" in str(caught.value)
