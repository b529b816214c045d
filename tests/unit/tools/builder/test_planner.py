"""The plan against a simple reference implementation, and how entries find their files."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest

from framestream.pipeline.config.data import DataConfig, EntryConfig
from framestream.pipeline.config.manifest import load_manifest
from framestream.tools.build_shards import main
from framestream.tools.builder import planner as plan
from framestream.tools.builder.planner import make_plan
from framestream.tools.common.arrow_files import map_table
from framestream.tools.common.errors import BuildError
from framestream.tools.fetch import host_health as hosts
from framestream.tools.fetch import root_map as roots
from framestream.tools.fetch.base import UNKNOWN, FetchError
from framestream.tools.fetch.root_map import resolve_entries
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.servers.web_server import Server


def manifest(folder: Path, entries, **data):
    path = corpus.manifest(folder / "stage2.yaml", [], data={"entries": entries, "shard_mb": 1, **data})
    return load_manifest(path)


def samples(seed: int, count: int) -> list[dict]:
    """Samples about a few videos, clips and pairs of images. Some have no media, and some are invalid."""
    draw, found = random.Random(seed), []
    for number in range(count):
        sample = {"id": f"{seed}-{number}", "conversations": TURNS}
        kind = draw.randrange(6)
        if kind == 0:
            sample["conversations"] = TEXT
        elif kind == 1:
            two = [{"from": "human", "value": "<image><image>"}, TURNS[1]]
            sample |= {"image": [f"{draw.randrange(9)}.png", f"{draw.randrange(9)}.png"], "conversations": two}
        elif kind == 2:
            sample |= {"video": f"sub/{draw.randrange(6)}.mp4", "start": draw.randrange(3), "end": 5}
        elif kind == 3:
            sample |= {"video": f"./sub/{draw.randrange(6)}.mp4", "duration": draw.choice([3, "9.5", "long", None])}
        elif kind == 4:
            sample |= {"video": f"{draw.randrange(4)}.gif", "video_read_type": draw.choice(["gif", "av"])}
        else:
            sample |= {"video": "../out.mp4"}
        found.append(sample)
    return found


def named(sample: dict, root: str) -> list[tuple]:
    """What a sample of :func:`samples` is about, by what it really is."""
    if "image" in sample:
        return [("image", f"{root}/{path}", "", None, None) for path in sample["image"]]
    if "video" not in sample:
        return []
    reader = sample.get("video_read_type", "decord")
    return [("video", f"{root}/{sample['video'].removeprefix('./')}", reader, sample.get("start"), sample.get("end"))]


@pytest.mark.parametrize("batch", [1, 7, 4096])
def test_media_are_rows_in_the_order_of_first_naming(tmp_path, monkeypatch, batch):
    monkeypatch.setattr(plan, "BATCH_SAMPLES", batch)
    media, entries, expected, dialogues = tmp_path / "media", [], [], []
    (media / "sub").mkdir(parents=True)
    for seed in range(4):
        root = media / "sub" if seed == 2 else media
        found = samples(seed, 60)
        if seed == 2:  # the same folder, named through a root below it
            for sample in found:
                if "video" in sample and "sub/" in sample["video"]:
                    sample["video"] = sample["video"].rpartition("/")[2]
        corpus.annotations(tmp_path / f"{seed}.jsonl", found)
        entries.append({"annotation": str(tmp_path / f"{seed}.jsonl"), "root": str(root)})
        for sample in found:
            if sample.get("video") == "../out.mp4":
                continue
            items = named(sample, str(root))
            for item in items:
                if item not in expected:
                    expected.append(item)
            dialogues.append((sample["id"], [expected.index(item) for item in items]))
    (tmp_path / "plan").mkdir()
    counts = make_plan(manifest(tmp_path, entries), resolve_entries(manifest(tmp_path, entries)), tmp_path / "plan")
    rows = map_table(tmp_path / "plan" / "media.arrow").to_pylist()
    folders = [str(media), str(media), str(media / "sub"), str(media)]
    got = [(r["kind"], f"{folders[r['entry']]}/{r['path']}", r["reader"], r["start"], r["end"]) for r in rows]
    assert got == expected
    table = map_table(tmp_path / "plan" / "dialogues.arrow").to_pylist()
    assert [(row["id"], row["media"]) for row in table] == dialogues
    alone = {row: [d for d, (_, media) in enumerate(dialogues) if media == [row]] for row in range(len(rows))}
    assert {number: row["dialogues"] for number, row in enumerate(rows)} == alone
    assert sum(count.media for count in counts.values()) == len(rows)
    assert sum(count.left_out["outside_root"] for count in counts.values()) == 240 - len(dialogues)
    tasks = json.loads((tmp_path / "plan" / "tasks.json").read_bytes())
    assert tasks["samples"] == {str(seed): 60 for seed in range(4)}
    order = [name.rpartition("-")[0] for name in tasks["tasks"]]
    assert all({row["kind"]} == {order[row["task"]].partition("-")[0]} for row in rows)


class Far:
    """A source that says where it was asked."""

    def __init__(self, origin: str, files: dict[str, int | FetchError]) -> None:
        self.origin, self.files = origin, files

    def find(self, path: str, tree: bool = False) -> int | None:
        size = self.files.get(f"{path}/" if tree else path)
        if isinstance(size, FetchError):
            raise size
        return size


@pytest.fixture
def far(monkeypatch):
    """Two names of one hub folder, and a web server."""
    files = {"a.mp4": 100, "b.mp4": UNKNOWN, "frames/": 30}
    files["c.mp4"] = FetchError("denied", "c.mp4", "accept the terms")
    sources = {"hf:o/n:x": Far("hf:o/n@77:x", files), "hf:o/n@77:x": Far("hf:o/n@77:x", files)}
    asked = []

    def open_source(given, limits, work=None):
        asked.append(given)
        if given not in sources:
            raise FetchError("unreachable", given, "no route")
        return sources[given]

    for module in (roots, hosts):
        monkeypatch.setattr(module, "open_source", open_source)
    return asked


def far_manifest(folder: Path):
    values = [{"video": name, "conversations": TURNS} for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "a.mp4")]
    values.append({"video": "a.mp4", "start": 1, "end": 2, "conversations": TURNS})
    values.append({"video": "frames", "video_read_type": "img", "conversations": TURNS})
    corpus.annotations(folder / "one.jsonl", values)
    corpus.annotations(folder / "two.jsonl", values[:1] + [{"video": "e.mp4", "conversations": TURNS}])
    corpus.annotations(folder / "three.jsonl", values)
    (folder / "roots.yaml").write_text(
        "https://a.org/one: hf:o/n:x\nhttps://a.org/two: hf:o/n:x\nhttps://a.org/three: hf:o/gone\n"
    )
    entries = [{"annotation": str(folder / f"{name}.jsonl"), "root": f"https://a.org/{name}"} for name in NAMES]
    return manifest(folder, entries, roots=str(folder / "roots.yaml"))


NAMES = ("one", "two", "three")


def test_a_dry_run_asks_places_and_says_what_they_lack(tmp_path, far):
    wanted = far_manifest(tmp_path)
    found = resolve_entries(wanted, quick=True)
    one, two, three = make_plan(wanted, found, None, strict=False).values()
    assert (one.samples, one.dialogues, one.media, one.found) == (7, 7, 6, 4)
    assert (one.bytes, one.unsized) == (130, 1), "the clip is of a file that is counted already"
    assert dict(one.missing) == {"denied": 1, "missing_file": 1} and "accept the terms" in one.first_messages["denied"]
    assert (two.media, two.found, dict(two.missing)) == (1, 0, {"missing_file": 1}), "a.mp4 is the first entry's"
    assert (three.samples, three.dialogues, three.media, three.found) == (7, 0, 6, 0)
    assert dict(three.left_out) == {"unresolved": 7}
    assert far.count("hf:o/gone") == 1 and "no route" in found[2].media.missing


def test_places_elsewhere_are_one_place_by_what_they_are(tmp_path, far):
    wanted = far_manifest(tmp_path)
    (tmp_path / "plan").mkdir()
    make_plan(wanted, resolve_entries(wanted), tmp_path / "plan", strict=False)
    rows = map_table(tmp_path / "plan" / "media.arrow").to_pylist()
    assert [(row["path"], row["entry"]) for row in rows if row["start"] is None and row["path"][0] in "ae"] == [
        ("a.mp4", 0),
        ("e.mp4", 1),
    ]
    with pytest.raises(BuildError, match="three: .*no route.*--skip-unresolved"):
        make_plan(wanted, resolve_entries(wanted), tmp_path / "plan")


def test_places_travel_to_other_processes(tmp_path, far):
    place = resolve_entries(far_manifest(tmp_path))[0].media
    assert (place.path, place.origin, place.spec, place.name) == (
        None,
        "hf:o/n@77:x",
        "hf:o/n@77:x",
        "https://a.org/one",
    )
    assert pickle.loads(pickle.dumps(place)).open().find("a.mp4") == 100


def test_annotation_files_are_fetched_and_planned(tmp_path):
    lines = "".join(json.dumps({"id": number, "conversations": TEXT}) + "\n" for number in range(3)).encode()
    with Server() as server:
        server.routes["/sets/a.jsonl"] = lambda request: request.serve(lines)
        entries = [{"annotation": f"{server.url}/sets/{name}.jsonl"} for name in ("a", "gone")]
        wanted = manifest(tmp_path, entries, cache=str(tmp_path / "cache"))
        found = resolve_entries(wanted)
        assert [item.annotation.resolved for item in found] == [True, False]
        assert "there is no such file" in found[1].annotation.missing and server.url in found[1].annotation.missing
        counts = make_plan(wanted, found, None, strict=False)
    assert counts["a"].dialogues == 3
    assert Path(found[0].annotation.path).is_relative_to(tmp_path / "cache")


def test_a_login_in_an_address_is_used_and_never_shown(tmp_path):
    with Server() as server:
        server.routes["/v/a.mp4"] = lambda request: request.serve(b"1234")
        host = server.url.removeprefix("http://")
        (tmp_path / "roots.yaml").write_text(f"r: 'url:http://me:secret@{host}/v/{{path}}'\n")
        corpus.annotations(tmp_path / "a.jsonl", [{"video": "a.mp4", "conversations": TURNS}])
        wanted = manifest(
            tmp_path, [{"annotation": str(tmp_path / "a.jsonl"), "root": "r"}], roots=str(tmp_path / "roots.yaml")
        )
        found = resolve_entries(wanted)
        counts = make_plan(wanted, found, None)
        assert server.asked and all("authorization" in headers for _, headers in server.asked)
    assert counts["a"].found == 1 and counts["a"].bytes == 4 and "secret" not in found[0].media.origin


def test_annotation_files_below_a_mapped_place(tmp_path):
    with Server() as server:
        line = json.dumps({"conversations": TEXT}).encode()
        server.routes["/mirror/d/x.jsonl"] = lambda request: request.serve(line)
        (tmp_path / "roots.yaml").write_text(f"hf:o/n: 'url:{server.url}/mirror/{{path}}'\n")
        data = DataConfig(
            entries=(EntryConfig(annotation="hf:o/n:d/x.jsonl"), EntryConfig(annotation="hf:o/n@main:d/y.jsonl")),
            roots=str(tmp_path / "roots.yaml"),
            cache=str(tmp_path / "cache"),
        )
        found = resolve_entries(replace(manifest(tmp_path, [{"annotation": "x.jsonl"}]), data=data))
    assert [item.annotation.resolved for item in found] == [True, False]
    assert "map hf:o/n to dir:FOLDER" in found[1].annotation.missing


@pytest.mark.parametrize(
    ("place", "named"),
    [("ftp://a.org/x", "not a known kind of location"), ("url:https://a.org/x", "{path}"), ("hf:x", "hf:OWNER")],
)
def test_a_place_that_is_none_is_one_clear_line(tmp_path, capsys, place, named):
    (tmp_path / "roots.yaml").write_text(json.dumps({"r": place}))
    corpus.annotations(tmp_path / "a.jsonl", [{"video": "a.mp4", "conversations": TURNS}])
    data = {"entries": [{"annotation": str(tmp_path / "a.jsonl"), "root": "r"}], "roots": str(tmp_path / "roots.yaml")}
    path = corpus.manifest(tmp_path / "stage2.yaml", [], data=data)
    assert main(["--stage", "2", "--manifest", str(path), "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{tmp_path / 'roots.yaml'}: r: " in error and named in error
