"""Additions to a finished root, retries, and several machines: same bytes, nothing rewritten or lost."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.ledger import read_ledger
from framestream.tools.verify_shards import main as verify
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.growing_corpus import Corpus
from tests.helpers.corpora.snapshot import members, snapshot
from tests.helpers.processes import kill_when


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("additions"))


@pytest.fixture(scope="module")
def first(data, tmp_path_factory) -> Path:
    """A finished root of one entry."""
    out = tmp_path_factory.mktemp("first")
    data.build(out, "films")
    return out


@pytest.fixture(scope="module")
def grown(data, first, tmp_path_factory) -> Path:
    """The same with two entries added, the first of them in front."""
    out = tmp_path_factory.mktemp("grown")
    shutil.copytree(first, out, dirs_exist_ok=True)
    data.build(out, "stills", "films", "both")
    return out


def test_an_addition_rewrites_no_shard_and_no_row(first, grown):
    before, after = snapshot(first), snapshot(grown)
    tars = [name for name in before if name.endswith((".tar", ".idx"))]
    assert tars and all(after[name] == before[name] for name in tars)
    assert len([name for name in after if name.endswith(".tar")]) > len([n for n in tars if n.endswith(".tar")])
    old, new = Index.open(first / "stage2"), Index.open(grown / "stage2")
    for name in ("media", "dialogues", "shards"):
        was = getattr(old, name)
        assert getattr(new, name).slice(0, len(was)).equals(was)


def test_the_grown_root_is_as_the_format_says(grown, capsys):
    assert verify([str(grown / "stage2"), "--deep", "--workers", "1"]) == 0, capsys.readouterr().out


def test_an_addition_builds_known_media_once(grown):
    index = Index.open(grown / "stage2")
    keys = index.media["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    sources = Counter(Path(source).name for source in index.media["source"].to_pylist())
    assert sources.pop("1.mp4") == 2, "whole, and a clip of it"
    assert set(sources.values()) == {1} and len(sources) == 9 - 1 + 9
    about = {row["id"]: row["media"] for row in index.dialogues.select(["id", "media"]).to_pylist()}
    assert about["b3"] == about["f3"] and about["b8"] not in ([], about["f3"])


def test_dialogues_of_a_grown_root_are_in_shards_or_ledger(data, grown):
    written = [json.loads(sample["json"]) for sample in members(grown / "stage2", "dialogue").values()]
    rows = [row for row in read_ledger(grown / "stage2").to_pylist() if row["kind"] == "dialogue"]
    found = Counter((item["entry"], item["id"]) for item in written)
    found += Counter((row["entry"], row["dialogue"]) for row in rows)
    planned = Counter()
    for name in ("films", "stills", "both"):
        lines = (data.folder / f"{name}.jsonl").read_text().splitlines()
        planned += Counter((name, json.loads(line)["id"]) for line in lines)
    assert found == planned
    missing = {row["dialogue"] for row in rows if row["reason"] == "missing_file"}
    assert missing == {"late", "later", "again"}
    record = json.loads((grown / "stage2" / "build.json").read_bytes())
    assert [entry["name"] for entry in record["entries"]] == ["stills", "films", "both"]
    assert [entry["planned"] for entry in record["entries"]] == [9, 8, 10]


@pytest.mark.parametrize("step", ["work/plan/tasks.json", "work/tasks", "work/outcomes.arrow", "image"])
def test_killed_while_adding(data, first, grown, tmp_path, step):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    root = tmp_path / "stage2"
    names = ("stills", "films", "both")
    killed = kill_when(data.command(tmp_path, *names), (root / step).exists)
    if killed and step.startswith("work/plan"):
        Index.open(root)  # the root stays readable until the last steps
    try:
        Index.open(root)
    except ShardsError as error:
        assert "no finished shards" in str(error)
    data.build(tmp_path, *names)
    assert snapshot(tmp_path) == snapshot(grown)


def test_the_same_command_again_does_nothing(data, grown):
    before = snapshot(grown)
    assert "nothing to do" in data.build(grown, "stills", "films", "both")
    assert snapshot(grown) == before


def test_failures_are_tried_again(data, first, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    late = corpus.video(data.folder / "media" / "late.mp4", seed=30)
    try:
        assert "nothing to do" in data.build(tmp_path, "films")
        data.build(tmp_path, "films", options=("--retry-failed",))
    finally:
        late.unlink()
    index = Index.open(tmp_path / "stage2")
    assert "late" in index.dialogues["id"].to_pylist()
    rows = read_ledger(tmp_path / "stage2").to_pylist()
    assert [(row["kind"], row["dialogue"], row["attempts"]) for row in rows] == [
        *[("media", "", 2), ("dialogue", "later", 1)],
    ]
    old = {name: digest for name, digest in snapshot(first).items() if name.endswith(".tar")}
    assert snapshot(tmp_path).items() >= old.items()


def test_the_file_that_has_changed_is_named_wherever_it_stands(data, first, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    film = data.folder / "films.jsonl"
    text = film.read_text()
    film.write_text(text.replace("f1", "g1"))
    try:
        ran = subprocess.run(data.command(tmp_path, "stills", "films"), capture_output=True, text=True)
    finally:
        film.write_text(text)
    assert ran.returncode == 2 and f"{film} has changed since the build; " in ran.stderr


def test_what_a_root_was_built_from_stays_in_its_manifest(data, first, tmp_path):
    shutil.copytree(first, tmp_path, dirs_exist_ok=True)
    before = snapshot(tmp_path)
    gone = subprocess.run(data.command(tmp_path, "stills"), capture_output=True, text=True)
    assert gone.returncode == 2 and "entry films is missing from the manifest; " in gone.stderr
    (data.folder / "media").rename(data.folder / "hidden")
    try:
        lost = subprocess.run(data.command(tmp_path, "films", "both"), capture_output=True, text=True)
    finally:
        (data.folder / "hidden").rename(data.folder / "media")
    assert (
        lost.returncode == 2
        and "the media of entry films were found for the build and are missing now (" in lost.stderr
    )
    assert f"{data.folder}/media: no such folder" in lost.stderr
    assert snapshot(tmp_path) == before


def test_an_unfinished_build_takes_no_more_entries(data, tmp_path):
    data.build(tmp_path, "films", options=("--rank", "1", "--of", "2"))
    more = subprocess.run(data.command(tmp_path, "films", "stills"), capture_output=True, text=True)
    assert more.returncode == 2 and "not finished: entry stills is new in the manifest; " in more.stderr


def test_nothing_to_try_again(data, tmp_path):
    data.build(tmp_path, "stills")
    before = snapshot(tmp_path)
    assert "nothing to retry" in data.build(tmp_path, "stills", options=("--retry-failed",))
    assert snapshot(tmp_path) == before


def test_an_entry_that_was_left_out_is_added_when_it_is_there(data, tmp_path):
    names = ("films", "stills")
    hidden = (data.folder / "stills.jsonl").rename(data.folder / "hidden.jsonl")
    try:
        data.build(tmp_path, *names, options=("--skip-unresolved",))
    finally:
        hidden.rename(data.folder / "stills.jsonl")
    assert [row["reason"] for row in read_ledger(tmp_path / "stage2").to_pylist() if row["kind"] == "entry"] == [
        "unresolved"
    ]
    data.build(tmp_path, *names)
    rows = read_ledger(tmp_path / "stage2").to_pylist()
    assert not [row for row in rows if row["kind"] == "entry"]
    assert len(Index.open(tmp_path / "stage2").dialogues) == 6 + 9


@pytest.mark.parametrize("together", [True, False])
def test_three_machines_give_the_bytes_of_one(data, tmp_path, together):
    names = ("films", "stills", "both")
    data.build(tmp_path / "one", *names)
    commands = [
        data.command(tmp_path / "three", *names, options=("--rank", str(rank), "--of", "3")) for rank in range(3)
    ]
    if together:
        running = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for c in commands]
        assert [process.wait() for process in running] == [0, 0, 0], [p.stderr.read() for p in running]
    else:
        said = [subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in reversed(commands)]
        assert ["other machines still build" in text for text in said] == [True, True, False]
    assert snapshot(tmp_path / "three") == snapshot(tmp_path / "one")
