"""Builds that lose everything, and commands in places that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from framestream.tools import build_shards
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.workers.in_process import use_this_process


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder as huggingface_hub caches it: files are links to blobs outside the snapshot."""
    use_this_process(monkeypatch)
    corpus.video(tmp_path / "hub" / "blobs" / "e0c1.mp4", 1)
    snapshot_folder = tmp_path / "hub" / "snapshots" / "4f1c"
    snapshot_folder.mkdir(parents=True)
    (snapshot_folder / "a.mp4").symlink_to("../../blobs/e0c1.mp4")
    corpus.annotations(tmp_path / "a.jsonl", [{"id": "a", "video": "a.mp4", "conversations": TURNS}])
    corpus.annotations(tmp_path / "t.jsonl", [{"id": "t", "conversations": TEXT}])
    return snapshot_folder


def build(folder: Path, root: str, *options: str, names: tuple[str, ...] = ("a",), **data: object) -> int:
    entries = [{"annotation": str(folder / f"{name}.jsonl"), "root": root} for name in names]
    frames, model = {"sampler": "middle", "min": 2, "max": 4, "size": 64}, {"vision_tower": {"patch": 8}}
    data = {"entries": entries, "shard_mb": 1, "cache": str(folder / "cache"), **data}
    manifest = corpus.manifest(folder / "m.yaml", [], data=data, frames=frames, model=model)
    return build_shards.main(["--stage", "2", "--manifest", str(manifest), "--workers", "1", *options])


def test_a_hub_cache_is_built_as_the_message_says(hub, tmp_path, capsys):
    assert build(tmp_path, str(hub)) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: none of the 1 dialogues of the stage was built, 1 because of outside_root: ")
    assert "map the root to links:FOLDER in a root map (data.roots)" in error and "--retry-failed" in error
    assert build(tmp_path, str(hub)) == 3, "the second time nothing is done, and the loss is said again"
    assert "none of the 1 dialogues" in capsys.readouterr().err
    (tmp_path / "roots.yaml").write_text(yaml.safe_dump({str(hub): f"links:{hub}"}))
    assert build(tmp_path, str(hub), "--retry-failed", roots=str(tmp_path / "roots.yaml")) == 0
    assert "1 video" in capsys.readouterr().out
    assert build(tmp_path, str(hub), "--retry-failed", roots=str(tmp_path / "roots.yaml")) == 0


def test_an_entry_that_is_lost_is_named(hub, tmp_path, capsys):
    assert build(tmp_path, str(hub), names=("t", "a")) == 3
    assert "of entry a was built" in capsys.readouterr().err.splitlines()[-1]


def test_leftovers_of_a_kill_in_the_last_moments_are_removed(hub, tmp_path):
    assert build(tmp_path, str(hub), names=("t",)) == 0
    root = tmp_path / "shards" / "stage2"
    before = snapshot(root)
    (root / "work.done" / "cache").mkdir(parents=True)
    for name in ("work.done/cache/media.mp4", "build.lock", "step.lock"):
        (root / name).touch()
    assert build(tmp_path, str(hub), names=("t",)) == 0
    assert snapshot(root) == before and not (root / "work.done").exists()


def test_a_finished_root_that_cannot_be_written_is_left_alone(hub, tmp_path, monkeypatch, capsys):
    assert build(tmp_path, str(hub), names=("t",)) == 0
    root = tmp_path / "shards" / "stage2"
    before = snapshot(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}

    def refuse(*arguments, **options):
        raise OSError(30, os.strerror(30), str(arguments[0]))

    for name in ("mkdir", "rename", "replace", "link"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setattr("framestream.pipeline.utils.locks.open", refuse, raising=False)
    assert build(tmp_path, str(hub), names=("t",)) == 0
    assert "already finished, nothing to do" in capsys.readouterr().out
    assert (snapshot(root), {path: path.stat().st_mtime_ns for path in root.rglob("*")}) == before
    assert build(tmp_path, str(hub), names=("t", "a")) == 2
    assert (
        capsys.readouterr().err == f"error: {root}: cannot be written (Read-only file system); choose another folder\n"
    )


@pytest.mark.parametrize("name", ["file", "file/below", "n" * 300])
def test_a_report_that_cannot_be_written_names_its_option(hub, tmp_path, capsys, name):
    (tmp_path / "file").write_text("mine")
    assert build(tmp_path, str(hub), "--dry-run", "--report", str(tmp_path / name)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: --report {tmp_path / name}: cannot be written (") and not captured.out
    assert captured.err.endswith("; name another folder\n") and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "n" * 300])
def test_an_output_that_cannot_be_made_is_named(hub, tmp_path, capsys, name):
    (tmp_path / "file").write_text("mine")
    assert build(tmp_path, str(hub), "--out", str(tmp_path / name)) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}")
