"""docs/format.md against a built root: what a reader made from the page alone reads is what the project reads."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.media.sampling import pad_to_clips, sample_indices
from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, MEDIA_SCHEMA, SHARD_SCHEMA, Index
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.pipeline.shards.ledger import read_ledger
from framestream.pipeline.shards.media_view import MediaViews
from tests.helpers.corpora.small_build import build_root
from tests.helpers.format_reader import Reader
from tests.helpers.paths import ROOT

PAGE = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return build_root(tmp_path_factory.mktemp("format"))


@pytest.fixture(scope="module")
def reader(root) -> Reader:
    return Reader(root)


def types(heading: str, first: str) -> dict[str, str]:
    """Names and types of the table below a heading (or line) of the page that begins with the column ``first``."""
    below = PAGE[PAGE.index(f"\n{heading}") :]
    table = re.search(rf"^\| {first} \| type \| meaning \|\n\| --- \| --- \| --- \|\n((?:\|.*\n)+)", below, re.M)[1]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()]
    found = {}
    for names, kinds in rows:
        names = re.findall(r"`(\w+)`", names)
        kinds = kinds.split(", ") if ", " in kinds else [kinds] * len(names)
        kinds = [
            kind if kind.startswith("list of ") or not kinds[0].startswith("list") else f"list of {kind}"
            for kind in kinds
        ]
        found |= dict(zip(names, kinds, strict=True))
    return found


def test_the_reader_uses_nothing_of_the_project():
    source = Path(sys.modules["tests.helpers.format_reader"].__file__).read_text(encoding="utf-8")
    names = {node.module for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)}
    names |= {
        alias.name for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert {name.partition(".")[0] for name in names} <= sys.stdlib_module_names | {"pyarrow"}


def test_the_index_is_read_as_the_project_reads_it(reader, root):
    index = Index.open(root)
    assert reader.fingerprint() == reader.build["index_fingerprint"] == index.fingerprint
    for name in ("media", "dialogues", "shards"):
        assert getattr(reader, name).to_pylist() == getattr(index, name).to_pylist()
        with pa.OSFile(str(root / "index" / f"{name}.arrow")) as file:
            data = file.read()
        assert data[:6] == data[-6:] == b"ARROW1"


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("`media.arrow`", MEDIA_SCHEMA),
        ("`dialogues.arrow`", DIALOGUE_SCHEMA),
        ("`shards.arrow`", SHARD_SCHEMA),
        ("## The ledger", LEDGER_SCHEMA),
    ],
)
def test_columns_are_of_the_types_on_the_page(heading, schema):
    words = {
        pa.string(): "string",
        pa.int32(): "int32",
        pa.uint32(): "uint32",
        pa.int64(): "int64",
        pa.float64(): "float64",
    }
    there = {
        field.name: f"list of {words[field.type.value_type]}" if pa.types.is_list(field.type) else words[field.type]
        for field in schema
    }
    stated = types(heading, "column")
    stated.pop("nominal", None)  # only of roots of the published readers
    assert stated == there and list(stated) == list(there)


def kind_of(value: Any) -> str:
    if isinstance(value, list):
        return f"list of {kind_of(value[0])}s"
    return {str: "string", int: "integer", float: "number", bool: "boolean"}[type(value)]


def test_json_members_have_the_fields_and_types_on_the_page(reader):
    stated = {"dialogue": types("### KEY.json of a dialogue", "field")}
    stated |= dict.fromkeys(("video", "image"), types("### KEY.json of a video", "field"))
    for shard in range(len(reader.shards)):
        for key, _, members in reader.samples(shard):
            text = members["json"][1].decode("utf-8")
            facts = json.loads(text)
            assert list(facts) == sorted(facts) and facts["key"] == key
            assert {name: kind_of(value) for name, value in facts.items()} == stated[
                reader.shards["folder"][shard].as_py()
            ]
            assert text == json.dumps(facts, ensure_ascii=False, separators=(",", ":"))


def test_samples_stand_in_the_order_of_the_rows_and_say_the_same(reader, root):
    for shard, row in enumerate(reader.shards.to_pylist()):
        samples, rows = list(reader.samples(shard)), reader.rows(shard)
        assert len(samples) == len(rows) == row["samples"]
        tar = bytes(reader.tar(shard))
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (row["bytes"], row["sha256"])
        assert reader.offsets(shard)[:-1] == [start for _, start, _ in samples]
        assert not any(tar[reader.offsets(shard)[-1] :])
        for (key, _, members), number in zip(samples, rows, strict=True):
            facts = json.loads(members["json"][1])
            if row["folder"] == "dialogue":
                item = reader.dialogues.slice(number, 1).to_pylist()[0]
                assert json.loads(facts["media"]) == [reader.media["key"][i].as_py() for i in item["media"]]
                for name in ("conversations", "meta"):
                    assert json.loads(facts[name]) == json.loads(item[name])
                assert [item[name] for name in ("key", "id", "entry", "split")] == [
                    key,
                    *(facts[name] for name in ("id", "entry", "split")),
                ]
                continue
            item = reader.media.slice(number, 1).to_pylist()[0]
            offset, data = next(iter(members.values()))
            assert (item["key"], item["shard"], item["offset"], item["size"]) == (key, shard, offset, len(data))
            assert facts == reader.facts(number) and facts["sha256"] == hashlib.sha256(data).hexdigest()
            assert {name: facts[name] for name in facts.keys() & item.keys()} == {
                name: item[name] for name in facts.keys() & item.keys()
            }
            for dialogue in json.loads(facts["dialogues"]):
                assert dialogue.keys() == {"key", "id", "entry", "conversations"}


def test_frames_are_those_the_project_shows(reader, root):
    manifest = load_manifest(root.parents[1] / "stage2.yaml")
    visuals = MediaViews(Index.open(root), manifest)
    for row, item in enumerate(reader.media.to_pylist()):
        jpegs = reader.frames(row)
        pixels = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"), dtype=np.int16) for jpeg in jpegs]
        assert all(jpeg[:2] == b"\xff\xd8" for jpeg in jpegs)
        assert {picture.shape for picture in pixels} == {(item["height"], item["width"], 3)}
        (view,) = visuals.views([row])
        if item["kind"] == "image":
            assert len(jpegs) == 1 and item["timestamps"] == [0.0]
            continue
        assert all(jpeg[-2:] == b"\xff\xd9" for jpeg in jpegs)
        assert view.frame_indices.tolist() == item["sample"]
        out = np.empty((len(view.frame_indices), manifest.frames.size, manifest.frames.size, 3), dtype=np.uint8)
        visuals.read_frames(view, 0, out)
        for place, shown in zip(item["sample"], out, strict=True):
            assert np.abs(pixels[place] - shown).mean() < 1
        assert item["start"] <= item["timestamps"][0] <= item["timestamps"][-1] <= item["start"] + item["duration"]


def test_fewer_frames_are_the_nearest_ones(reader, root):
    manifest = load_manifest(root.parents[1] / "stage2.yaml", ["frames.sampler=middle"])
    visuals = MediaViews(Index.open(root), manifest)
    for row, item in enumerate(reader.media.to_pylist()):
        if item["kind"] == "video":
            wanted = sample_indices(manifest.frames, item["vlen"], item["fps"], item["duration"])
            wanted = pad_to_clips(wanted, item["vlen"], 4).tolist()
            assert [reader.nearest(row, number) for number in wanted] == visuals.views([row])[0].frame_indices.tolist()


def test_marks_stand_for_media_in_order(reader):
    rows = {row["id"]: number for number, row in enumerate(reader.dialogues.to_pylist())}
    turns = reader.spoken(rows["two"])
    (speaker, (first, one, between, other, last)), answer = turns
    assert (speaker, first, between, last) == ("human", "", " or ", "?") and answer == ("gpt", ["A square."])
    sources = [reader.media["source"][row].as_py().rpartition("/")[2] for row in (one, other)]
    assert sources == ["<b>0.png", "<b>1.png"]
    assert reader.spoken(rows["t"]) == [("human", ["Hello"]), ("gpt", ["Good day."])]
    assert json.loads(reader.dialogues["meta"][rows["clip"]].as_py()) == {"note": 7}


def test_build_json_and_the_ledger_account_for_every_dialogue(reader, root):
    assert set(types("## build.json", "field")) == set(reader.build)
    ledger = pq.read_table(root / "ledger" / "ledger.parquet", page_checksum_verification=True)
    assert ledger.equals(read_ledger(root))
    for entry in reader.build["entries"]:
        mine = [row for row in ledger.to_pylist() if row["entry"] == entry["name"]]
        left_out = [row for row in mine if row["kind"] == "dialogue"]
        there = [name for name in reader.dialogues["entry"].to_pylist() if name == entry["name"]]
        assert entry["planned"] == len(there) + len(left_out) and entry["dialogues"] == len(there)
        assert sum(entry["left_out"].get("dialogue", {}).values()) == len(left_out)
    frames = sum(len(item["timestamps"]) for item in reader.media.to_pylist())
    assert sum(entry["frames"] for entry in reader.build["entries"]) == frames


@pytest.mark.parametrize("folder", ["video", "image", "dialogue"])
def test_files_for_other_readers_are_as_on_the_page(reader, root, folder):
    mine = [row for row in reader.shards.to_pylist() if row["folder"] == folder]
    info = json.loads((root / folder / ".nv-meta" / ".info.json").read_text())
    assert info.keys() == {"energon_version", "shard_counts"}
    assert info["shard_counts"] == {row["name"]: row["samples"] for row in mine}
    split = yaml.safe_load((root / folder / ".nv-meta" / "split.yaml").read_text())
    named = {part: [row["name"] for row in mine if row["split"] == part] for part in ("train", "val", "test")}
    assert split == {"exclude": [], "split_parts": named}
    assert yaml.safe_load((root / folder / ".nv-meta" / "dataset.yaml").read_text()).keys() == {
        "__module__",
        "__class__",
    }
    for part, name in (("train", "shardindex.json"), ("val", "shardindex-val.json")):
        shards = [row for row in mine if row["split"] == part]
        assert (root / folder / name).exists() == bool(shards)
        if shards:
            listed = json.loads((root / folder / name).read_text())
            assert listed.keys() == {"__kind__", "wids_version", "name", "shardlist"}
            assert [(item["url"], item["nsamples"], item["filesize"]) for item in listed["shardlist"]] == [
                (row["name"], row["samples"], row["bytes"]) for row in shards
            ]
            for item in listed["shardlist"]:
                assert item["md5sum"] == hashlib.md5((root / folder / item["url"]).read_bytes()).hexdigest()
