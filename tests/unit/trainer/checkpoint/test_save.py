"""Saving: if a rank dies at any moment, ``latest`` names a complete checkpoint."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.checkpoint import disk_usage, save
from framestream.trainer.checkpoint.save import (
    CheckpointError,
    WriteError,
    latest_checkpoint,
    read_state,
    save_checkpoint,
)
from framestream.trainer.distributed.process_group import DistributedContext
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL

ALONE = DistributedContext(0, 1, torch.device("cpu"))
STATE = {"epoch": 0, "step": 1, "fingerprint": {}}


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the code under test handles it."""


class Engine:
    """Stands for DeepSpeed's: writes two files, the second one in two parts."""

    def save_checkpoint(self, folder: str, tag: str, **options: object) -> None:
        path = Path(folder) / tag
        (path / "model.pt").write_bytes(b"m" * 1000)
        with open(path / "optim.pt", "wb") as file:
            file.write(b"o" * 1000)
            os.fsync(file.fileno())
            file.write(b"o" * 1000)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(save, "barrier", lambda: None)
    monkeypatch.setattr(save, "all_reduce_sum", lambda values, context: values)


@pytest.fixture
def small() -> Manifest:
    return manifest(SIZE, SMALL)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def dies(monkeypatch, moment: int) -> None:
    """Raise at the ``moment``-th call that changes or flushes the disk, before or after it is done."""
    calls = 0

    def fatal(module: object, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == moment:
                if moment % 2 and name != "fsync":
                    real(*arguments, **options)
                raise Killed
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "write_text"), (Path, "mkdir")):
        fatal(module, name)


def test_latest_is_complete_whenever_a_save_is_killed(tmp_path, small, monkeypatch):
    deaths, moment = 0, 0
    while True:
        moment += 1
        run = tmp_path / str(moment)
        for step in (2, 4):
            save_checkpoint(Engine(), run, step, STATE, small, ALONE)
        with monkeypatch.context() as patch:
            dies(patch, moment)
            try:
                save_checkpoint(Engine(), run, 6, STATE, small, ALONE)
            except Killed:
                deaths += 1
            else:
                break
        found = latest_checkpoint(run)
        assert found.name in ("step-000004", "step-000006")
        assert read_state(found)["step"] == int(found.name[-1])
        save_checkpoint(Engine(), run, 6, STATE, small, ALONE)  # the next run reaches the same step
        assert names(run) == ["latest", "step-000004", "step-000006"]
        assert latest_checkpoint(run).name == "step-000006" and read_state(latest_checkpoint(run))["step"] == 6
    assert deaths > 10


def test_the_checkpoints_of_the_last_steps_are_kept(tmp_path, small):
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(Engine(), tmp_path, step, STATE, small, ALONE)
    assert names(tmp_path) == ["latest", "step-1000000", "step-1000001"]


def test_a_checkpoint_without_a_file_or_a_byte_is_refused(tmp_path, small):
    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE)
    optim = latest_checkpoint(tmp_path) / "optim.pt"
    os.truncate(optim, 1999)
    with pytest.raises(CheckpointError, match=r"optim.pt: has 1999 bytes instead of 2000; .*latest"):
        read_state(latest_checkpoint(tmp_path))
    optim.unlink()
    with pytest.raises(CheckpointError, match=r"optim.pt: is missing"):
        read_state(latest_checkpoint(tmp_path))
    shutil.rmtree(latest_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="names step-000002, which does not exist"):
        latest_checkpoint(tmp_path)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, small, monkeypatch):
    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE)
    needed = disk_usage.checkpoint_bytes(small)
    monkeypatch.setattr(disk_usage.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(CheckpointError, match="GB are needed"):
        save_checkpoint(Engine(), tmp_path, 4, STATE, small, ALONE)
    assert latest_checkpoint(tmp_path).name == "step-000002" and read_state(latest_checkpoint(tmp_path))


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path, small):
    class Full(Engine):
        def save_checkpoint(self, folder: str, tag: str, **options: object) -> None:
            (Path(folder) / tag / "model.pt").write_bytes(b"m")
            raise OSError(28, "No space left on device")

    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE)
    with pytest.raises(WriteError, match="rank 0 cannot write its part .*No space left"):
        save_checkpoint(Full(), tmp_path, 4, STATE, small, ALONE)
    assert latest_checkpoint(tmp_path).name == "step-000002" and read_state(latest_checkpoint(tmp_path))
    save_checkpoint(Engine(), tmp_path, 4, STATE, small, ALONE)
    assert names(tmp_path) == ["latest", "step-000002", "step-000004"]
