"""verify_shards finds nothing in an intact root, and finds all damage."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from framestream.pipeline.shards.index import FILES, Index, write_index
from framestream.pipeline.shards.ledger import read_ledger, write_ledger
from framestream.tools import verify_shards
from framestream.tools.verify.root import verify
from framestream.tools.verify.tar import plain_header
from tests.helpers.corpora.small_build import build_root
from tests.helpers.paths import VERIFY_SHARDS

VIDEOS, IMAGES, DIALOGUES = "video/train-000000.tar", "image/train-000000.tar", "dialogue/train-000000.tar"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_root(tmp_path_factory.mktemp("verified"))


@pytest.fixture
def root(built: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(built, tmp_path / "stage2"))


def found(root: Path, deep: bool = False) -> list[str]:
    """Findings as ``file: problem``."""
    return [f"{file}: {problem}" for file, problem, fix in verify(root, deep, 1, 100).findings.listed if fix]


@pytest.mark.parametrize("options", [[], ["--deep"], ["--workers", "2"]])
def test_nothing_is_found_in_a_sound_root(built, capsys, options):
    assert verify_shards.main([str(built), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{built}: 5 shards, 15 samples, 19 frames") and out.endswith("0 findings\n")


def test_nothing_is_found_in_a_root_of_the_published_readers(tmp_path):
    assert found(build_root(tmp_path, compat="published"), deep=True) == []


def test_started_by_path_it_lists_what_it_finds(root):
    os.remove(root / VIDEOS)
    (root / IMAGES).write_bytes(b"")
    ran = subprocess.run(
        [sys.executable, str(VERIFY_SHARDS), str(root), "--workers", "2"], capture_output=True, text=True
    )
    assert ran.returncode == 1, ran.stderr
    assert f"{VIDEOS}: is missing; restore it" in ran.stdout and f"{IMAGES}: has 0 bytes" in ran.stdout


def test_only_so_many_findings_are_shown(root, capsys):
    for number in range(5):
        (root / f"{number}.tmp").touch()
    assert verify_shards.main([str(root), "--show", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith("... and 3 more") and lines[3].endswith("5 findings")


@pytest.mark.parametrize("there", [False, True])
def test_what_is_no_finished_root_is_bad_input(tmp_path, capsys, there):
    folder = tmp_path / "stage3"
    if there:
        (folder / "work").mkdir(parents=True)
    assert verify_shards.main([str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "build.json" in captured.err and not captured.out


# Damage to files ------------------------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def drop_ledger_row(root: Path) -> None:
    write_ledger(root / "ledger" / "ledger.parquet", read_ledger(root)[1:])


def member(root: Path, shard: str, extension: str, number: int = 0) -> tarfile.TarInfo:
    with tarfile.open(root / shard) as tar:
        return [item for item in tar if item.name.endswith(extension)][number]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda r: flip(r / VIDEOS, member(r, VIDEOS, "mp4").offset_data + 900), "mp4: sha256 is"),
        (lambda r: flip(r / VIDEOS, member(r, VIDEOS, "json").offset_data + 9), "json: is not an object with"),
        (lambda r: flip(r / VIDEOS, member(r, VIDEOS, "mp4", 1).offset + 130), "no valid tar header at byte"),
        (lambda r: os.truncate(r / VIDEOS, 30_000), "the file ends within"),
        (lambda r: os.truncate(r / IMAGES, (r / IMAGES).stat().st_size - 512), "its last member is not followed by"),
        (lambda r: flip(r / DIALOGUES, -1), "its last member is not followed by"),
        (lambda r: flip(r / DIALOGUES, member(r, DIALOGUES, "json").offset_data + 40), "its sha256 is not the one"),
        (lambda r: shutil.copy(r / VIDEOS, r / "video/train-000009.tar"), "train-000009.tar: is not a shard of"),
        (lambda r: (r / "video/train-000000.tar.tmp").touch(), "train-000000.tar.tmp: is an unfinished"),
        (lambda r: (r / "work").mkdir(), "work: a build of this root is not finished"),
        (lambda r: flip(r / f"{VIDEOS}.idx", 8), ".tar.idx: does not hold the offsets"),
        (lambda r: flip(r / "ledger/ledger.parquet", -20), "ledger.parquet: its digest is not the one in build.json"),
        (lambda r: os.remove(r / f"{VIDEOS}.idx"), ".tar.idx: cannot be read (No such file"),
        (lambda r: (r / "video/train-000009.tar.idx").touch(), "train-000009.tar.idx: belongs to no shard"),
        (lambda r: edit(r / "video/shardindex.json", '"nsamples": 4', '"nsamples": 5'), "shardlist: not as in"),
        (lambda r: edit(r / "video/shardindex.json", '"md5sum": "', '"md5sum": "0'), "shardlist: not as in"),
        (lambda r: edit(r / "image/.nv-meta/split.yaml", "train-000000", "train-000001"), "split_parts: not as in"),
        (lambda r: edit(r / "image/.nv-meta/.info.json", ".tar", ".tat"), "shard_counts: not as in"),
        (lambda r: edit(r / "image/.nv-meta/dataset.yaml", "Crude", "Cooked"), "__class__: not as in"),
        (lambda r: (r / "image/.nv-meta/dataset.yaml").write_text("a: [" * 3000), "is not a valid YAML file"),
        (lambda r: os.remove(r / "image/shardindex-val.json"), "shardindex-val.json: cannot be read"),
        (lambda r: flip(r / "index/media.arrow", 2000), "index: its files do not match index_fingerprint"),
        (lambda r: os.remove(r / "index/dialogues.arrow"), "index/dialogues.arrow: cannot be read"),
        (lambda r: (r / "build.json").write_text("[" * 100_000), "build.json: is not a valid JSON file"),
        (lambda r: edit(r / "build.json", '"planned": 8', '"planned": 9'), "1 planned dialogues are neither"),
        (lambda r: edit(r / "build.json", '"frames": 18', '"frames": 20'), "21 frames, the index 19"),
        (lambda r: edit(r / "build.json", '"dialogue": 2', '"dialogue": 3'), "shards does not count"),
        (drop_ledger_row, "left_out does not count the ledger's rows"),
        (lambda r: os.truncate(r / "ledger/ledger.parquet", 900), "ledger.parquet: cannot be read"),
    ],
)
def test_damage_is_found_and_named(root, damage, expected):
    damage(root)
    lines = found(root)
    assert any(expected in line for line in lines), lines
    assert not any("\n" in line for line in lines)


def test_without_an_index_shards_are_checked_by_themselves(root):
    flip(root / "index" / "media.arrow", 2000)
    assert len(found(root, deep=True)) == 1
    flip(root / VIDEOS, member(root, VIDEOS, "mp4").offset_data + 900)
    assert any("its sha256 is not the one in its json" in line for line in found(root))


def promised(name: str, data: bytes) -> Any:
    """What the format promises of a small file, apart from how it is written down; None if it cannot be read."""
    try:
        if name.endswith(".parquet"):
            return pq.read_table(io.BytesIO(data))
        value = yaml.safe_load(data) if name.endswith(".yaml") else json.loads(data)
    except (ValueError, yaml.YAMLError):
        return None
    for free in ("specification", "energon_version"):  # the builder's own record; Energon's own command changes it
        if free in value:
            value[free] = type(value[free]).__name__
    return value


@st.composite
def damages(draw, data: bytes) -> bytes:
    """``data`` with a bit flipped, cut short, grown, or with a stretch replaced."""
    kind = draw(st.sampled_from(["flip", "flip", "cut", "grow", "replace"]))
    place = draw(st.integers(0, len(data) - 1))
    if kind == "flip":
        return data[:place] + bytes([data[place] ^ 1 << draw(st.integers(0, 7))]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    piece = draw(st.binary(min_size=1, max_size=64))
    return data + piece if kind == "grow" else data[:place] + piece + data[place + draw(st.integers(0, 64)) :]


@settings(max_examples=200)
@given(st.data())
def test_whatever_is_damaged_is_found_or_says_the_same(built, data):
    """Every byte of shards, index and .tar.idx is covered; elsewhere, what goes unnoticed changes nothing promised."""
    names = sorted(str(path.relative_to(built)) for path in built.rglob("*") if path.is_file())
    name = data.draw(st.sampled_from(names))
    path = built / name
    whole = path.read_bytes()
    damaged = data.draw(damages(whole))
    path.write_bytes(damaged)
    try:
        count = verify(built, False, 1, 10).findings.count
    finally:
        path.write_bytes(whole)
    if damaged == whole:
        assert count == 0
    elif count == 0:
        assert not name.endswith((".tar", ".arrow", ".idx"))
        assert promised(name, damaged) == promised(name, whole)


def test_sizes_that_a_damaged_file_states_are_not_believed(root):
    """A member of 8 GiB, an index of 2**62 rows, a page of 2 GiB: no more memory than before."""
    verify(root, True, 1, 10)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shard = root / VIDEOS
    data = shard.read_bytes()
    shard.write_bytes(plain_header(data[:100].rstrip(b"\0"), 8**11 - 1) + data[512:])
    for name in ("index/media.arrow", "ledger/ledger.parquet"):
        path = root / name
        whole = path.read_bytes()
        for place in range(4, len(whole) - 16, len(whole) // 40):
            path.write_bytes(whole[:place] + b"\xff\xff\xff\x7f" + whole[place + 4 :])
            assert found(root)
        path.write_bytes(whole)
    assert any("ends within the 8,589,934,591 bytes" in line for line in found(root))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


# Roots whose digests are right and whose contents are not -------------------------------------------------------------


def reseal(root: Path, **columns: tuple[str, Callable[[dict], None]]) -> None:
    """Write the index again, with rows changed, as if the builder had meant what is there.

    ``columns`` has for a table the function that changes its rows; shards get the size and digest of their files.
    """
    index = Index.open(root)
    tables = {name: getattr(index, name).to_pylist() for name in FILES}
    for name, change in columns.items():
        change(tables[name])
    for row in tables["shards"]:
        path = root / row["folder"] / row["name"]
        if path.is_file():
            row |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    made = [pa.Table.from_pylist(tables[name], schema) for name, schema in FILES.items()]
    record = json.loads((root / "build.json").read_text())
    del record["digests"]  # as in a root from before there were any
    record["index_fingerprint"] = write_index(root, *made)
    (root / "build.json").write_text(json.dumps(record))


def set_value(row: int, column: str, value: Any) -> Callable[[list], None]:
    """Put ``value``, or what a function makes of the old one, into a row of a table."""

    def change(rows: list) -> None:
        rows[row][column] = value(rows[row][column]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("table", "change", "expected"),
    [
        ("media", set_value(1, "offset", lambda x: x + 1), "mp4: offset is"),
        ("media", set_value(1, "size", lambda x: x + 1), "mp4: size is"),
        ("media", set_value(1, "sha256", "0" * 64), "json: sha256 is"),
        ("media", set_value(0, "split", "val"), "mp4: split is 'train', the index says 'val'"),
        ("media", set_value(0, "fps", 9.5), "json: fps is 8.0, the index says 9.5"),
        ("media", set_value(0, "timestamps", lambda x: [*x[:-1], x[-1] + 0.5]), "json: timestamps is"),
        ("media", set_value(0, "frame_offset", lambda x: [x[0] + 1, *x[1:]]), "frame_offset and frame_size"),
        ("media", set_value(0, "frame_size", lambda x: x[:-1]), "frame_offset and frame_size"),
        ("media", set_value(0, "frame_digest", lambda x: [x[0] ^ 1, *x[1:]]), "frame_digest of the index"),
        ("media", set_value(4, "frame_digest", []), "frame_digest of the index"),
        ("media", set_value(4, "frame_size", lambda x: [x[0] - 1]), "frame_offset and frame_size"),
        ("media", set_value(2, "shard", 3), "are not in the order of shards.arrow"),
        ("media", lambda rows: rows.append(rows[-1]), "8 rows, its shards 7 samples"),
        ("media", lambda rows: rows.insert(0, rows.pop(1)), "sample 0 is v"),
        ("media", set_value(0, "key", "../../etc/passwd"), "a key is not one of v i followed by 24 hex digits"),
        ("media", lambda rows: rows[1].update(key=rows[0]["key"]), "1 keys are repeated"),
        ("dialogues", set_value(0, "id", "other"), "json: id is 'v0', the index says 'other'"),
        ("dialogues", set_value(0, "conversations", "[]"), "json: conversations is"),
        ("dialogues", set_value(0, "conversations", "[" * 9000), "conversations in the index is not JSON"),
        ("dialogues", set_value(0, "meta", '{"a":1}'), "json: meta is"),
        ("dialogues", set_value(0, "media", [1]), "json: media is"),
        ("dialogues", set_value(0, "media", [7]), "names rows that media.arrow does not have"),
        ("dialogues", set_value(0, "entry", "elsewhere"), "the index has 1"),
        ("shards", set_value(0, "name", "../x.tar"), "expected number 0"),
        ("shards", set_value(0, "name", "train-000001.tar"), "expected number 0"),
        ("shards", set_value(0, "folder", "/etc"), "invalid shard"),
        ("shards", set_value(0, "samples", 3), "7 rows, its shards 6 samples"),
    ],
)
def test_an_index_that_says_something_else_is_found(root, table, change, expected):
    reseal(root, **{table: change})
    lines = found(root)
    assert any(expected in line for line in lines), lines


def rewrite(path: Path, change: Callable[[str, bytes], bytes]) -> None:
    """Change the data of members in place; they keep their sizes."""
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        for item in tar:
            old = bytes(data[item.offset_data : item.offset_data + item.size])
            new = change(item.name, old)
            assert len(new) == len(old)
            data[item.offset_data : item.offset_data + item.size] = new
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("shard", "old", "new", "expected"),
    [
        (VIDEOS, rb'"fps":8.0', b'"fps":8  ', "json: fps is not of the type float"),
        (VIDEOS, rb'"vlen":24', b'"vlen":25', "json: vlen is 25, the index says 24"),
        (VIDEOS, rb'"kind":"video"', b'"kinds":"vide"', "is not an object with the fields"),
        (VIDEOS, rb'"salvaged":false', b'"salvaged":"no" ', "salvaged is not of the type bool"),
        (VIDEOS, rb'"sample":\[0,1,2,3\]', b'"sample":[0,1,2,2]', "sample is"),
        (VIDEOS, rb'"dialogues":"\[', b'"dialogues":"{', "dialogues is not JSON"),
        (DIALOGUES, rb'<image>', b"<video>", "has 0 <image> marks and 1 media"),
        (DIALOGUES, rb'human', b"robot", "a turn is not {from"),
        (DIALOGUES, rb'"split":"train"', b'"split":"trial"', "split is 'trial', should be 'train'"),
        (DIALOGUES, rb'What', b"Whut", "json: conversations is"),
    ],
)  # fmt: skip
def test_json_members_that_say_something_else_are_found(root, shard, old, new, expected):
    rewrite(root / shard, lambda name, data: re.sub(old, new, data) if name.endswith("json") else data)
    reseal(root)
    lines = found(root)
    assert any(expected in line for line in lines), lines


def test_frames_that_cannot_be_decoded_are_found_with_right_digests(root):
    """The middle of a frame is zeros, in the shard, its json and the index: only --deep looks there."""
    first = Index.open(root).media.slice(0, 1).to_pylist()[0]
    start = first["frame_offset"][1] - first["offset"]
    data = (root / VIDEOS).read_bytes()[first["offset"] :][: first["size"]]
    middle = start + first["frame_size"][1] // 2
    bad = data[:middle] + b"\xff\xc4" * 20 + data[middle + 40 :]
    digests = [hashlib.sha256(content).hexdigest().encode() for content in (data, bad)]
    rewrite(root / VIDEOS, lambda name, content: bad if content == data else content.replace(*digests))
    md5 = hashlib.md5((root / VIDEOS).read_bytes()).hexdigest()
    listed = root / "video" / "shardindex.json"
    listed.write_text(re.sub(r'"md5sum": "\w+"', f'"md5sum": "{md5}"', listed.read_text()))
    spans = [
        (start - first["offset"], size) for start, size in zip(first["frame_offset"], first["frame_size"], strict=True)
    ]
    frames = [xxhash.xxh3_64_intdigest(bad[start : start + size]) % 2**32 for start, size in spans]
    reseal(root, media=lambda rows: rows[0].update(sha256=digests[1].decode(), frame_digest=frames))
    assert found(root) == []
    (line,) = found(root, deep=True)
    assert f"{first['key']}.mp4: frame 1" in line


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"mtime": 1}, "not as in the format (mtime, checksum)"),
        ({"uid": 1000}, "not as in the format (uid, checksum)"),
        ({"uname": "me"}, "not as in the format (checksum, owner)"),
        ({"mode": 0o755}, "not as in the format (mode, checksum)"),
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, "not as in the format (checksum, type, link)"),
        ({"name": "k\x1b[31m.json"}, "k\\x1b[31m is not a key of the folder"),
    ],
)
def test_members_that_are_not_plain_are_found(root, change, expected):
    path = root / DIALOGUES
    data = path.read_bytes()
    item = member(root, DIALOGUES, "json")
    for name, value in change.items():
        setattr(item, name, value)
    path.write_bytes(item.tobuf(tarfile.USTAR_FORMAT, "ascii") + data[512:])
    reseal(root)
    lines = found(root)
    assert any(expected in line for line in lines), lines


def test_a_shard_of_pax_headers_is_refused(root):
    """What `tar` and tarfile write by default is not what readers were promised."""
    path = root / DIALOGUES
    with tarfile.open(path) as tar:
        samples = [(item.name, tar.extractfile(item).read()) for item in tar]
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in samples:
            item = tarfile.TarInfo(name)
            item.size, item.pax_headers = len(data), {"comment": "é"}
            tar.addfile(item, io.BytesIO(data))
    reseal(root)
    assert any("its tar header is not as in the format" in line for line in found(root))
