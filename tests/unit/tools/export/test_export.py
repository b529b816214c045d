"""export_dataset: annotations that each trainer documents, the frames and times of the shards, and safe repetition."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path

import av
import decord
import numpy as np
import pyarrow as pa
import pytest

from framestream.pipeline.adapters import ShardDataset
from framestream.pipeline.shards.index import Index, write_index
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.locks import lock_folder
from framestream.tools.export import media_files
from framestream.tools.export.folder import LOCK
from framestream.tools.export.formats import FORMATS
from framestream.tools.export_dataset import FORMAT_NAMES, main
from tests.helpers.corpora.small_build import build_root
from tests.helpers.corpora.small_root import Root, turns
from tests.helpers.servers.web_server import Server


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Three videos, a clip, images and text; two dialogues are held out."""
    return build_root(tmp_path_factory.mktemp("export"))


def odd_root(folder: Path) -> Path:
    """A root of dialogues that some formats cannot say; returns its stage's folder."""
    root = Root(folder)
    first, second, image = root.video(8, 8), root.video(6, 3), root.still(40, 30)
    system = {"from": "system", "value": "Be brief."}
    root.dialogue(turns("<image> and <image>, then <image>?", "Three."), [first, image, second])
    root.dialogue([system, *turns("<image>\nWhat?", "This.")], [image])
    root.dialogue(turns("Look.", "Here: <image>"), [image])
    root.dialogue([{"from": "gpt", "value": "Hi <image>"}, *turns("Hello", "Yes.", "Bye")])
    root.dialogue([*turns("One.")[:1], *turns("Two.", "Both.")])
    root.dialogue(turns("<audio> <video> <img>x</img>", "None of them."))
    root.dialogue(turns("<image> <image>", "More marks than media."), [image])
    root.dialogue(turns("No mark", "Fewer marks than media."), [image])
    return root.write() / "stage2"


def rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="ascii")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def exported(root, name: str, out: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of train and val, and those that are left out."""
    assert main([str(root), "--format", name, "--out", str(out)]) == 0
    extension = FORMATS[name].extension
    found = [out / f"train.{extension}", out / f"val.{extension}", out / "left_out.jsonl"]
    return tuple(rows(path) if path.exists() else [] for path in found)


def speech(row: dict) -> list[tuple[str, str]]:
    """Who says what, whatever the names of the fields."""
    turns = row.get("messages", row.get("conversations"))
    names = {"user": "human", "assistant": "gpt"}
    return [(names.get(role, role), text) for role, text in (tuple(turn.values()) for turn in turns)]


def paths(row: dict, kind: str) -> list[str]:
    value = row.get(kind, row.get(f"{kind}s", []))
    return [value] if isinstance(value, str) else value


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_dialogue_is_there_with_its_media_and_marks(built, tmp_path, name):
    found = exported(built, name, tmp_path / "out")
    assert not found[2]
    for split, written in zip(("train", "val"), found[:2], strict=True):
        dataset = ShardDataset(built, split=split)
        by_key = {sample.dialogues[0].key: sample for sample in map(dataset.__getitem__, range(len(dataset)))}
        assert sorted(by_key) == sorted(row["id"] for row in written)
        for row in written:
            sample = by_key[row["id"]]
            said = [(turn["from"], turn["value"]) for turn in sample.dialogues[0].turns]
            assert [(role, text.replace("<video>", "<image>")) for role, text in speech(row)] == said
            text = "".join(text for _, text in speech(row))
            videos, images = paths(row, "video"), paths(row, "image")
            assert [Path(path).stem for path in videos + images] == [item.key for item in sample.media]
            marks = (len(videos), len(images)) if name != "llava" else (0, len(videos) + len(images))
            assert (text.count("<video>"), text.count("<image>")) == marks
            assert all((tmp_path / "out" / path).is_file() for path in videos + images)


#: format -> fields of a row without media, of one with a video, and of one with two images
FIELDS = {
    "llava": ({"id", "conversations"}, {"video": str}, {"image": list}),
    "qwen-vl": ({"id", "conversations"}, {"video": str}, {"image": list}),
    "llamafactory": ({"id", "messages", "images", "videos"}, {"videos": list}, {"images": list}),
    "swift": ({"id", "messages", "images", "videos"}, {"videos": list}, {"images": list}),
    "sharegpt": ({"id", "conversations", "images", "videos"}, {"videos": list}, {"images": list}),
}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_rows_have_the_documented_fields(built, tmp_path, name):
    written, _, _ = exported(built, name, tmp_path)
    keys = {"llamafactory": ["role", "content"], "swift": ["role", "content"]}.get(name, ["from", "value"])
    roles = {"user", "assistant"} if keys[0] == "role" else {"human", "gpt"}
    turns = [turn for row in written for turn in row.get("messages", row.get("conversations"))]
    assert all(list(turn) == keys for turn in turns) and {turn[keys[0]] for turn in turns} == roles
    plain, video, images = FIELDS[name]
    text = next(row for row in written if not paths(row, "video") + paths(row, "image"))
    assert text.keys() == plain and not any(text.get(field) for field in ("images", "videos"))
    for fields, kind, count in ((video, "video", 1), (images, "image", 2)):
        row = next(row for row in written if len(paths(row, kind)) == count)
        assert row.keys() == plain | fields.keys()
        assert {field: type(row[field]) for field in fields} == fields
    if FORMATS[name].columns:  # readers take the types of columns from the first rows
        assert written[0]["videos"] and written[1]["images"]
    info = tmp_path / "dataset_info.json"
    assert info.exists() == (name in ("llamafactory", "sharegpt"))
    if info.exists():
        described = json.loads(info.read_text())
        assert list(described) == ["train", "val"]
        for split, entry in described.items():
            first = rows(tmp_path / entry["file_name"])[0]
            assert entry["file_name"].startswith(split) and entry["formatting"] == "sharegpt"
            assert set(entry["columns"].values()) <= first.keys()
            tags, turn = entry["tags"], first[entry["columns"]["messages"]][0]
            assert turn[tags["role_tag"]] == tags["user_tag"] and turn[tags["content_tag"]]


def test_files_have_the_frames_and_times_of_the_shards(built, tmp_path):
    assert main([str(built), "--format", "swift", "--out", str(tmp_path)]) == 0
    index = Index.open(built)
    for item in index.media.to_pylist():
        with open(index.shard_path(item["shard"]), "rb") as shard:
            tar = shard.read()
        stored = [
            tar[start : start + size] for start, size in zip(item["frame_offset"], item["frame_size"], strict=True)
        ]
        folder, extension = ("images", "jpg") if item["kind"] == "image" else ("videos", "mp4")
        path = tmp_path / folder / item["key"][1:3] / f"{item['key']}.{extension}"
        if item["kind"] == "image":
            assert [path.read_bytes()] == stored
            continue
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            seconds = [float(packet.pts * packet.time_base) for packet in packets]
            assert [bytes(packet) for packet in packets] == stored
            length = float(stream.duration * stream.time_base)
            assert stream.frames == len(stored)
            assert float(stream.average_rate) == pytest.approx(len(stored) / length, rel=1e-3)
        wanted = np.array(item["timestamps"]) - item["start"]
        assert np.allclose(seconds, wanted, atol=1e-4)
        assert length == pytest.approx(item["duration"] - wanted[0], abs=1e-3)
        with av.open(str(path)) as container:
            shapes = [(frame.height, frame.width) for frame in container.decode(video=0)]
        assert shapes == [(item["height"], item["width"])] * len(stored)
        video = decord.VideoReader(str(path))  # as LLaVA and Qwen-VL read
        assert (len(video), video[len(video) - 1].shape[:2]) == (len(stored), shapes[0])
        assert video.get_avg_fps() == pytest.approx(len(stored) / length, rel=1e-3)
    assert sum(item["start"] > 0 for item in index.media.to_pylist()) == 1


#: format -> what becomes of each dialogue of odd_root: its reason, or nothing if it is written
ODD = {
    "llava": ["media", "system", "", "", "turns", "", "marks", "marks"],
    "qwen-vl": ["", "system", "marks", "", "", "text", "marks", "marks"],
    "llamafactory": ["", "", "", "", "turns", "text", "marks", "marks"],
    "sharegpt": ["", "", "", "", "turns", "text", "marks", "marks"],
    "swift": ["", "", "", "", "", "text", "marks", "marks"],
}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_what_a_format_cannot_say_is_left_out_with_a_reason(tmp_path, name, capsys):
    root = odd_root(tmp_path / "root")
    written, held, left_out = exported(root, name, tmp_path / "out")
    keys = Index.open(root).dialogues["key"].to_pylist()
    reasons = {row["key"]: row["reason"] for row in left_out}
    assert [reasons.get(key, "") for key in keys] == ODD[name] and not held
    assert {row["id"] for row in written} == set(keys) - reasons.keys()
    assert all(len(row["message"]) > 10 for row in left_out)
    assert re.search(r"left out: .*; see .*left_out.jsonl", capsys.readouterr().out)
    texts = {row["id"]: speech(row) for row in written}
    assert texts[keys[3]] == [("human", "Hello"), ("gpt", "Yes.")]  # the turns from which something is learned
    if keys[0] in texts:
        mixed = next(row for row in written if row["id"] == keys[0])
        assert texts[keys[0]][0][1] == "<video> and <image>, then <video>?"
        assert (len(paths(mixed, "video")), len(paths(mixed, "image"))) == (2, 1)
    if keys[1] in texts:
        assert texts[keys[1]][0] == ("system", "Be brief.")


def test_a_repeated_export_changes_nothing_and_reads_no_media(built, tmp_path, monkeypatch):
    command = [str(built), "--format", "llava", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    before = snapshot(tmp_path / "out")
    monkeypatch.setattr(media_files.MediaExport, "read", None)
    assert main(command) == 0
    assert snapshot(tmp_path / "out") == before


def test_a_killed_export_goes_on_and_ends_in_the_same_bytes(built, tmp_path, monkeypatch):
    """Killed in one write after another, with half of the bytes on the disk and before the file has its name."""
    command = [str(built), "--format", "sharegpt", "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    replace, complete = os.replace, tmp_path / "out" / "dataset_info.json"

    def killed_export(left: int) -> int:
        """Export in a process that is killed in its write number ``left``; return how it ended."""

        def kill(source, target):
            nonlocal left
            left -= 1
            if left < 0:
                os.truncate(source, os.path.getsize(source) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        if child := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.replace = kill
        os._exit(main([*command, str(tmp_path / "out")]))

    # 1 record, 7 media, 4 annotation files: two of the processes die in the record and in the first medium
    for left in (0, 1, 2, 2, 2, 2, 1, 2, 3):
        assert killed_export(left) == -signal.SIGKILL
        assert list((tmp_path / "out").rglob("*.tmp")) and not complete.exists()
    assert main([*command, str(tmp_path / "out")]) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "whole")


def refused(capsys, *command: object) -> str:
    """The one line of an export that is refused."""
    capsys.readouterr()
    assert main([str(word) for word in command]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_other_files_and_other_exports_are_not_touched(built, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "'mine.txt', which no export wrote" in refused(capsys, built, "--format", "swift", "--out", out)
    assert snapshot(out) == {"mine.txt": b"mine"}
    (out / "mine.txt").unlink()
    assert main([str(built), "--format", "swift", "--out", str(out)]) == 0
    before = snapshot(out)
    assert "an export of format swift" in refused(capsys, built, "--format", "llava", "--out", out)
    other = odd_root(tmp_path / "root")
    assert "an export of other shards" in refused(capsys, other, "--format", "swift", "--out", out)
    video = next(out.rglob("*.mp4"))
    write_atomic(video, b"another")
    assert f"{video.name}: has 7 bytes" in refused(capsys, built, "--format", "swift", "--out", out)
    assert before.keys() == snapshot(out).keys() and video.read_bytes() == b"another"
    inside = built / "exported"
    assert "is in the root" in refused(capsys, built, "--format", "swift", "--out", inside) and not inside.exists()
    assert "no finished shards" in refused(capsys, tmp_path, "--format", "swift", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nothing_is_written_if_nothing_can_be_said(tmp_path, capsys):
    root = Root(tmp_path / "root")
    root.dialogue([{"from": "system", "value": "Be brief."}, *turns("Hello", "Hi.")])
    out = tmp_path / "out"
    line = refused(capsys, root.write() / "stage2", "--format", "llava", "--out", out)
    assert "none of its 1 dialogues can be said in the format llava (system 1)" in line and not out.exists()
    empty = Root(tmp_path / "empty").write() / "stage2"
    line = refused(capsys, empty, "--format", "llava", "--out", out)
    assert line.endswith(f"{empty}: has no dialogues to export") and not out.exists()


def test_one_export_at_a_time_writes_into_a_folder(built, tmp_path, capsys):
    with lock_folder(tmp_path / "out", LOCK, "export"):
        line = refused(capsys, built, "--format", "swift", "--out", tmp_path / "out")
    assert f"another export is running here (process {os.getpid()} on " in line


def test_a_full_disk_is_told_before_anything_is_written(built, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    line = refused(capsys, built, "--format", "swift", "--out", tmp_path / "out")
    assert "are free; make room" in line and not list(tmp_path.rglob("*.mp4"))


def test_damaged_media_are_left_out_until_they_are_restored(built, tmp_path, capsys):
    root = Path(shutil.copytree(built, tmp_path / "stage2"))
    shard = next((root / "video").glob("train-*.tar"))
    sound = shard.read_bytes()
    item = next(row for row in Index.open(root).media.to_pylist() if row["kind"] == "video")
    shard.write_bytes(sound[: item["offset"] + 99] + b"\0\xff" * 8 + sound[item["offset"] + 115 :])
    command = [str(root), "--format", "qwen-vl", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    assert "1 media are damaged" in capsys.readouterr().err
    (lost,) = [row for row in rows(tmp_path / "out" / "left_out.jsonl") if row["split"] == "train"]
    assert lost["reason"] == "damaged" and "sha256" in lost["message"]
    assert len(rows(tmp_path / "out" / "train.json")) == 5
    shard.write_bytes(sound)
    assert main(command) == 0
    assert len(rows(tmp_path / "out" / "train.json")) == 6 and not rows(tmp_path / "out" / "left_out.jsonl")


def forged_root(folder: Path, table: str, column: str, value: object) -> Path:
    """A root with one image, whose index has another value in one column."""
    root = Root(folder)
    root.dialogue(turns("<image>", "One."), [root.still(30, 20)])
    stage = root.write() / "stage2"
    index = Index.open(stage)
    tables = {name: getattr(index, name) for name in ("media", "dialogues", "shards")}
    number = tables[table].column_names.index(column)
    values = pa.array([value], tables[table].schema.field(column).type)
    tables[table] = tables[table].set_column(number, column, values)
    (stage / "build.json").write_text(json.dumps({"index_fingerprint": write_index(stage, *tables.values())}))
    return stage


@pytest.mark.parametrize(
    ("table", "column", "value", "says"),
    [
        ("media", "key", "../../../../escaped", "no valid key or kind"),
        ("media", "kind", "../up", "no valid key or kind"),
        ("dialogues", "split", "../up", "has a split or media"),
        ("dialogues", "media", [7], "has a split or media"),
        ("dialogues", "media", [-1], "has a split or media"),
    ],
)
def test_hostile_names_cannot_leave_the_folder(tmp_path, capsys, table, column, value, says):
    stage = forged_root(tmp_path / "root", table, column, value)
    assert says in refused(capsys, stage, "--format", "swift", "--out", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"root"}


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("shards", "name", "../../../secret"),
        ("media", "size", 1 << 60),
        ("media", "offset", -512),
        ("media", "sha256", "0" * 64),
    ],
)
def test_hostile_byte_ranges_are_not_read(tmp_path, capsys, table, column, value):
    stage = forged_root(tmp_path / "root", table, column, value)
    shutil.copy(stage / "image" / "train-000000.tar", tmp_path / "secret")
    out = tmp_path / "out"
    if column == "size":
        assert "are free; make room" in refused(capsys, stage, "--format", "swift", "--out", out)
    else:
        assert main([str(stage), "--format", "swift", "--out", str(out)]) == 1
        assert [row["reason"] for row in rows(out / "left_out.jsonl")] == ["damaged"]
    assert not list(tmp_path.rglob("*.jpg"))


def test_a_remote_root_gives_the_same_files(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the cache
    monkeypatch.setenv("no_proxy", "*")
    assert main([str(built), "--format", "swift", "--out", str(tmp_path / "local")]) == 0
    with Server() as server:
        for path in built.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                server.routes[f"/stage2/{path.relative_to(built)}"] = lambda request, data=data: request.serve(data)
        assert main([f"{server.url}/stage2", "--format", "swift", "--out", str(tmp_path / "remote")]) == 0
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")


def test_a_server_that_ends_stops_the_export_which_then_goes_on(built, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # of the cache
    monkeypatch.setattr("framestream.pipeline.storage.http.BACKOFF", 0.002)
    monkeypatch.setenv("no_proxy", "*")
    out, broken = tmp_path / "out", {built / "image" / "train-000000.tar"}
    with Server() as server:

        def serve(request, path):
            request.answer(503) if path in broken else request.serve(path.read_bytes())

        for path in built.rglob("*"):
            if path.is_file():
                route = f"/stage2/{path.relative_to(built)}"
                server.routes[route] = lambda request, path=path: serve(request, path)
        command = [f"{server.url}/stage2", "--format", "swift", "--out", str(out)]
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "image/train-000000.tar" in line and "503" in line
        assert list(out.rglob("*.mp4")) and not list(out.glob("*.jsonl"))
        broken.clear()
        assert main(command) == 0
    assert [len(rows(out / f"{split}.jsonl")) for split in ("train", "val")] == [6, 2]


def test_the_command_knows_every_format():
    assert set(FORMAT_NAMES) == set(FORMATS)
