"""One corpus built from every kind of source has the same bytes from each."""

from __future__ import annotations

import json
import subprocess
from collections import Counter

import pytest

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from framestream.tools.verify_shards import main as verify
from tests.helpers.corpora.layouts import FILMS, Corpus, Places
from tests.helpers.corpora.snapshot import snapshot
from tests.helpers.servers.s3_server import s3_server
from tests.helpers.servers.web_server import Server

LAYOUTS = ("zips", "split_zip", "tars", "tars_gz", "web", "web_archives", "hub", "hub_archives", "bucket")
LAYOUTS += ("bucket_archives",)
LEDGER = "stage2/ledger/ledger.parquet"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    with s3_server() as bucket, Server() as server:
        yield Places(Corpus(tmp_path_factory.mktemp("corpus")), server, bucket)


def record(out):
    """Return build.json without what follows from the messages of the ledger: they name the place."""
    fields = json.loads((out / "stage2" / "build.json").read_bytes())
    del fields["digest"], fields["digests"][LEDGER.removeprefix("stage2/")]
    return fields


def build(places, folder, layout, *options):
    """The root that a layout's build leaves; it writes into its output, the cache, and nothing else."""
    command = places.corpus.command(folder, getattr(places, layout)(folder), *options)
    before = snapshot(folder)
    ran = subprocess.run(command, cwd=folder, env=places.environment(), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    after = snapshot(folder)
    assert {name for name in after.keys() - before.keys() if not name.startswith(("out/", "cache/"))} == set()
    assert before.items() <= after.items()
    assert sorted(item.name for item in (folder / "out").iterdir()) == ["stage2"]
    return folder / "out"


@pytest.fixture(scope="module")
def local(places, tmp_path_factory):
    """The build from folders of this machine."""
    return build(places, tmp_path_factory.mktemp("folders"), "folders")


def ledger(out):
    """The ledger without its messages, which name places."""
    return read_ledger(out / "stage2").drop_columns("message").to_pylist()


def test_the_build_from_folders(places, local, capsys):
    index = Index.open(local / "stage2")
    media = {(row["source"], row["start"], row["duration"]): row for row in index.media.to_pylist()}
    assert Counter(source for source, *_ in media)[f"{FILMS}/a.mp4"] == 6, "one video and five clips of it"
    fps = {row["source"]: row["fps"] for row in media.values()}
    assert fps["https://example.org/tvqa/s01"] == 3.0, "by the name of its root"
    (turned,) = (row for row in media.values() if row["source"].endswith("turned.mp4"))
    assert (turned["source_width"], turned["source_height"]) == (272, 640)
    (scene,) = (row for row in media.values() if row["source"].endswith("s01") and row["start"] == 1.0)
    assert scene["vlen"] == 10, "frames 3 to 12 are shown from 1 s to 4 s"
    left = {(row["dialogue"], row["reason"]) for row in ledger(local) if row["kind"] == "dialogue"}
    assert left == {("missing", "missing_file"), ("none", "missing_file"), ("page", "not_media")}
    assert len(index.dialogues) + len(left) == places.corpus.dialogues
    assert verify([str(local / "stage2"), "--deep", "--workers", "1"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_place_gives_the_same_bytes(places, local, layout, tmp_path):
    places.server.asked.clear()
    out = build(places, tmp_path, layout)
    wanted, found = snapshot(local), snapshot(out)
    for digests in (wanted, found):
        assert digests.pop(LEDGER) and digests.pop("stage2/build.json")
    assert record(out) == record(local)
    assert found == wanted
    assert ledger(out) == ledger(local)
    messages = read_ledger(out / "stage2")["message"].to_pylist()
    assert not any(str(tmp_path / "out") in message for message in messages), "no names of fetched copies"


@pytest.mark.parametrize(("cache", "times"), [("1", 1), ("0", 6)])
def test_a_video_that_clips_are_cut_from_is_fetched_once(places, local, tmp_path, cache, times):
    """By one worker, because the held-out clip of another shard may be at work at the same time."""
    places.server.asked.clear()
    out = build(places, tmp_path, "web", "--workers", "1", "--cache-gb", cache)
    assert snapshot(out)["stage2/index/media.arrow"] == snapshot(local)["stage2/index/media.arrow"]
    whole = [path for path, headers in places.server.asked if headers.get("range") != "bytes=0-0"]
    assert whole.count("/films/a.mp4") == times
    assert whole.count("/films/turned.mp4") == whole.count("/notes/films.jsonl") == 1
