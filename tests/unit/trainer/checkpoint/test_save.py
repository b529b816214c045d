"""Saving: if a rank dies at any moment, ``latest`` names a complete checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.training import EvaluateConfig
from framestream.pipeline.utils.records import write_record
from framestream.trainer.checkpoint import disk_usage, save
from framestream.trainer.checkpoint.load import load_checkpoint
from framestream.trainer.checkpoint.save import (
    WriteError,
    check_settings,
    checkpoint_settings,
    read_settings,
    save_checkpoint,
    write_settings,
)
from framestream.trainer.checkpoint.state import (
    CheckpointError,
    best_checkpoint,
    check_files,
    latest_checkpoint,
    read_state,
)
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.training.best_score import BestScore
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_syncs_the_files_that_it_wrote(monkeypatch, tmp_path: Path, rank: int):
    """An fsync on another machine flushes that machine's cache only."""
    names = ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00.pt", "zero_pp_rank_1_mp_rank_00.pt"]
    for name in names:
        (tmp_path / name).write_bytes(b"values")
    synced: list[str] = []
    monkeypatch.setattr(save, "fsync_path", lambda path: synced.append(path.name))
    monkeypatch.setattr(save, "gather_objects", lambda value, context: [value])
    digests = save._sync_files(tmp_path, DistributedContext(rank, 2, torch.device("cpu")))
    assert sorted(synced) == sorted(digests) == ([names[2]] if rank else names[:2])


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


def validated(best: int, score: float = 1.0) -> dict:
    """Return the state of validations whose best was step ``best``."""
    state = BestScore(EvaluateConfig(every=1))
    state.add(best, {"loss": score})
    return state.state_dict()


def test_the_best_checkpoint_outlives_newer_ones(tmp_path, small):
    """Also in a part of the run that is not validated, and with a pointer that is damaged."""
    for step, state in ((2, validated(2)), (4, validated(2)), (6, validated(2)), (8, None), (10, None)):
        save_checkpoint(Engine(), tmp_path, step, STATE, small, ALONE, state)
    assert names(tmp_path) == ["best", "latest", "step-000002", "step-000008", "step-000010"]
    assert best_checkpoint(tmp_path) == "step-000002" and read_state(latest_checkpoint(tmp_path))["step"] == 10
    (tmp_path / "checkpoints" / "best").write_text('{"checkpoint": "../x"}')
    assert best_checkpoint(tmp_path) == ""
    save_checkpoint(Engine(), tmp_path, 12, STATE, small, ALONE, validated(12))
    assert names(tmp_path) == ["best", "latest", "step-000010", "step-000012"]


def test_the_best_checkpoint_is_complete_whenever_a_save_is_killed(tmp_path, small, monkeypatch):
    """The state that a run resumes from names a best step whose checkpoint is there."""
    moment = 0
    while True:
        moment += 1
        run = tmp_path / str(moment)
        for step in (2, 4, 6):
            save_checkpoint(Engine(), run, step, STATE, small, ALONE, validated(2))
        with monkeypatch.context() as patch:
            dies(patch, moment)
            try:
                save_checkpoint(Engine(), run, 8, STATE, small, ALONE, validated(8, 0.5))
            except Killed:
                pass
            else:
                break
        state = read_state(latest_checkpoint(run))
        assert state["validation"]["best_step"] == (8 if state["step"] == 8 else 2)
        assert read_state(run / "checkpoints" / f"step-{state['validation']['best_step']:06d}")
        assert read_state(run / "checkpoints" / best_checkpoint(run))
        save_checkpoint(Engine(), run, 8, STATE, small, ALONE, validated(8, 0.5))  # the next run reaches the same step
        assert names(run) == ["best", "latest", "step-000006", "step-000008"]
    assert moment > 10


@pytest.mark.parametrize(
    "change",
    [{"best_step": "2"}, {"stale": -1}, {"best": None}, {"scores": []}, {"pending": 3}, {"step": True}, {"more": 1}],
)
def test_a_damaged_state_of_validations_is_one_line(tmp_path, small, change):
    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE, validated(2))
    state = read_state(latest_checkpoint(tmp_path))
    write_record(latest_checkpoint(tmp_path) / "state.json", {**state, "validation": {**validated(2), **change}})
    with pytest.raises(CheckpointError, match=r"state.json: not a state of a checkpoint \(validation"):
        read_state(latest_checkpoint(tmp_path))


def test_a_checkpoint_without_a_file_or_a_byte_is_refused(tmp_path, small):
    save_checkpoint(Engine(), tmp_path, 1, STATE, small, ALONE)
    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE)
    optim = latest_checkpoint(tmp_path) / "optim.pt"
    os.truncate(optim, 1999)
    with pytest.raises(CheckpointError, match=r"optim.pt: has 1999 .* 2000; step-000001 is complete: .*latest"):
        read_state(latest_checkpoint(tmp_path))
    optim.unlink()
    with pytest.raises(CheckpointError, match=r"optim.pt: is missing"):
        read_state(latest_checkpoint(tmp_path))
    shutil.rmtree(latest_checkpoint(tmp_path))
    with pytest.raises(CheckpointError, match="names step-000002, which does not exist"):
        latest_checkpoint(tmp_path)


def test_a_changed_byte_is_found_and_a_sound_checkpoint_named(tmp_path, small):
    for step in (1, 2):
        save_checkpoint(Engine(), tmp_path, step, STATE, small, ALONE)
    folder = latest_checkpoint(tmp_path)
    assert not check_files(folder, read_state(folder))
    data = bytearray((folder / "optim.pt").read_bytes())
    data[700] ^= 16
    (folder / "optim.pt").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(None, tmp_path, small, ALONE)
    pointer = tmp_path / "checkpoints" / "latest"
    fix = f"step-000001 is complete: write this name into {pointer} to resume from it"
    assert str(caught.value) == f"{folder / 'optim.pt'}: damaged (its digest differs); {fix}"
    pointer.write_text("step-000001\n")
    (older := latest_checkpoint(tmp_path)).joinpath("model.pt").write_bytes(b"x" * 1000)
    with pytest.raises(CheckpointError, match="model.pt: damaged .*; no older checkpoint is complete: remove .*latest"):
        load_checkpoint(None, tmp_path, small, ALONE)
    assert older.name == "step-000001"


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_files_of_a_checkpoint(tmp_path, world):
    names = [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(world)]
    for name in (*names, "mp_rank_00_model_states.pt"):
        (tmp_path / name).write_bytes(b"x")
    digests = {path.name: "0" * 16 for path in tmp_path.iterdir()}
    faults = [check_files(tmp_path, {"digests": digests}, rank, world) for rank in range(world)]
    assert all(names[rank] in fault for rank, fault in enumerate(faults)) or "mp_rank_00_model" in faults[0]
    only = {"digests": {"mp_rank_00_model_states.pt": "0" * 16}}
    assert [bool(check_files(tmp_path, only, rank, world)) for rank in range(world)] == [True] + [False] * (world - 1)


@pytest.mark.parametrize("name", ["latest", "state.json"])
def test_every_flip_and_truncation_of_a_record_is_one_line(tmp_path, small, name, caplog):
    save_checkpoint(Engine(), tmp_path, 1, STATE, small, ALONE)
    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE)
    path = next((tmp_path / "checkpoints").rglob(f"step-000002/{name}"), tmp_path / "checkpoints" / name)
    data, rng = path.read_bytes(), np.random.default_rng(5)
    changes = [bytes(len(data)), b"", b"[]", b"{}", b'{"a":' * 100_000]
    for _ in range(300):
        at, bit = int(rng.integers(len(data))), 1 << int(rng.integers(8))
        changes += [data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :], data[:at]]
    accepted = 0
    for changed in changes:
        path.write_bytes(changed)
        try:
            state = read_state(latest_checkpoint(tmp_path))
        except CheckpointError as error:
            assert "\n" not in str(error) and len(str(error)) < 600 and str(tmp_path) in str(error)
        else:  # only space outside of values has changed
            accepted += 1
            assert state["step"] == 2 and json.loads(changed) == json.loads(data)
    assert accepted < 30


def test_a_state_of_an_older_version_is_read_and_checked(tmp_path, small, caplog):
    save_checkpoint(Engine(), tmp_path, 2, STATE, small, ALONE)
    path = latest_checkpoint(tmp_path) / "state.json"
    state = {name: value for name, value in read_state(path.parent).items() if name != "digests"}
    path.write_text(json.dumps(state))
    (tmp_path / "checkpoints" / "latest").write_text("step-000002")
    assert read_state(latest_checkpoint(tmp_path)) == read_state(latest_checkpoint(tmp_path)) == state
    assert caplog.text.count("state.json: has no digest, as in older versions") == 1
    for change in ({"step": "2"}, {"world": 0}, {"loader": []}, {"files": {"../optim.pt": 1}}, {"files": {"a": None}}):
        path.write_text(json.dumps(state | change))
        with pytest.raises(CheckpointError, match="state.json: not a state of a checkpoint"):
            read_state(path.parent)


def test_settings_of_a_run_are_a_record(tmp_path, small):
    path = tmp_path / "settings.json"
    write_settings(path, small)
    assert read_settings(path) == json.loads(json.dumps(checkpoint_settings(small)))
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(CheckpointError, match=r"settings.json: damaged list of settings .*; .*remove this file"):
        read_settings(path)


def test_costs_are_named_only_where_nothing_else_differs(tmp_path, small):
    """They follow from the model, and nobody wrote them."""
    saved = {**checkpoint_settings(small), "batching.cost.token": 1.5}
    with pytest.raises(CheckpointError, match=r"other settings \(batching.cost.token \(saved: 1.5, now: "):
        check_settings(saved, small, tmp_path)
    with pytest.raises(CheckpointError, match=r"other settings \(seed \(saved: 9, now: 0\)\);"):
        check_settings(saved | {"seed": 9}, small, tmp_path)


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
