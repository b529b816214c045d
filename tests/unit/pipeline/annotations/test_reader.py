"""Annotation shapes, the sampling grammar, and samples that cannot be used."""

from __future__ import annotations

import gzip
import json
import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, MediaRef, normalize
from framestream.pipeline.annotations.reader import (
    MAX_FOREIGN,
    AnnotationFileError,
    count_samples,
    read_annotations,
)
from framestream.pipeline.config.data import EntryConfig

HUMAN = {"from": "human", "value": "<image>\nDescribe."}
GPT = {"from": "gpt", "value": "A dog."}


def entry(**fields):
    return EntryConfig(annotation="set/set.json", root="media", **fields)


def sample(**fields):
    return {"conversations": [HUMAN, GPT], **fields}


def reason(value, placeholder="convert", **fields):
    with pytest.raises(AnnotationError) as caught:
        normalize(value, entry(**fields), 0, placeholder)
    assert "\n" not in str(caught.value)
    return caught.value.reason


def values(annotation):
    return [turn["value"] for turn in annotation.turns]


# Shapes of the reference ----------------------------------------------------------------------------------------------


def test_video():
    found = normalize(sample(id="cap-17", video="seg_a/clip_0017.mp4"), entry(), 3)
    assert found == Annotation(
        "set", 3, "cap-17", (MediaRef("video", "media", "seg_a/clip_0017.mp4", "decord"),), (HUMAN, GPT), {}
    )
    assert found.media[0].source == "media/seg_a/clip_0017.mp4"


def test_image_with_a_mark_at_the_end_and_a_numeric_id():
    turns = [{"from": "human", "value": "What is it?\n<image>"}, GPT, {"from": "human", "value": "Sure?"}, GPT]
    found = normalize({"id": 42, "image": "train/42.jpg", "conversations": turns}, entry(), 0)
    assert found.id == "42" and found.media == (MediaRef("image", "media", "train/42.jpg"),)
    assert list(found.turns) == turns


def test_several_images_keep_their_order():
    turns = [{"from": "human", "value": "First <image> then <image>. What changed?"}, GPT]
    found = normalize({"image": ["a/1.png", "a/2.png"], "conversations": turns}, entry(), 0)
    assert [item.path for item in found.media] == ["a/1.png", "a/2.png"] and list(found.turns) == turns


def test_text_only_and_an_id_from_the_position():
    found = normalize({"conversations": [{"from": "human", "value": "Hi"}, GPT]}, entry(), 7)
    assert found.media == () and found.id == "7"


@pytest.mark.parametrize(("start", "end"), [(12.4, 27.9), ("12.4", "27.9")])
def test_clip_with_numbers_or_numeric_text(start, end):
    found = normalize(sample(video="star/ABC.mp4", start=start, end=end), entry(), 0)
    assert (found.media[0].start, found.media[0].end) == (12.4, 27.9) and found.meta == {}


def test_the_samples_reader_wins_over_the_entrys():
    assert normalize(sample(video="x1.gif", video_read_type="gif"), entry(), 0).media[0].reader == "gif"
    folder = normalize(sample(video="tvqa/s01e02_seg03/", video_read_type="img", start=7.3, end=19), entry(), 0)
    assert folder.media == (MediaRef("video", "media", "tvqa/s01e02_seg03", "img", 7.3, 19.0),)
    assert normalize(sample(video="x.avi"), entry(reader="av"), 0).media[0].reader == "av"


def test_other_fields_are_kept_as_json_can_hold_them():
    found = normalize(sample(video="a.mp4", duration=31.2, score=math.nan, tags=("x", {"y": math.inf})), entry(), 0)
    assert found.meta == {"duration": 31.2, "score": None, "tags": ["x", {"y": None}]}


def test_null_keys_of_a_turn_are_missing():
    """Rows of a table have all keys."""
    unused = dict.fromkeys(("from", "value"))
    turns = [{**unused, "role": "user", "content": "q"}, {**GPT, "role": None, "content": None}]
    found = normalize({"conversations": turns}, entry(), 0)
    assert list(found.turns) == [{"from": "human", "value": "q"}, GPT]


@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant"), ("User", "GPT")])
@pytest.mark.parametrize("fields", [("from", "value"), ("role", "content")])
def test_role_and_field_names(roles, fields):
    turns = [dict(zip(fields, (role, text), strict=True)) for role, text in zip(roles, ("q", "a"), strict=True)]
    system = dict(zip(fields, ("system", "Be brief."), strict=True))
    found = normalize({"conversations": [system, *turns]}, entry(), 0)
    assert [turn["from"] for turn in found.turns] == ["system", "human", "gpt"]


def test_image_wins_over_video():
    found = normalize(sample(image="a.jpg", video="b.mp4"), entry(), 0)
    assert [item.kind for item in found.media] == ["image"]


def test_video_marks_become_image_marks_or_are_refused():
    turns = [{"from": "human", "value": "<video>\nWhat?"}, GPT]
    assert values(normalize({"video": "a.mp4", "conversations": turns}, entry(), 0))[0] == "<image>\nWhat?"
    assert reason({"video": "a.mp4", "conversations": turns}, "refuse") == "placeholder_refused"


def test_a_missing_mark_of_one_media_item_is_put_first():
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "What?"}, GPT]
    found = normalize({"video": "a.mp4", "conversations": turns}, entry(), 0)
    assert values(found) == ["s", "<image>\nWhat?", "A dog."]


def test_a_mark_in_an_opening_gpt_turn_is_not_counted():
    turns = [{"from": "gpt", "value": "<image>"}, HUMAN, GPT]
    assert len(normalize({"image": "a.jpg", "conversations": turns}, entry(), 0).media) == 1


# Samples that cannot be used ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", "bad_sample"),
        (None, "bad_sample"),
        ({"id": 1, "video": "a.mp4"}, "no_conversations"),
        ({"conversations": []}, "no_conversations"),
        ({"conversations": "hello"}, "no_conversations"),
        ({"conversations": ["hello", "you"]}, "bad_turn"),
        ({"conversations": [{"from": "robot", "value": "x"}, GPT]}, "bad_turn"),
        ({"conversations": [{"value": "x"}, GPT]}, "bad_turn"),
        ({"conversations": [{"from": "human", "value": None}, GPT]}, "bad_turn"),
        ({"conversations": [{"from": "human", "value": ["x"]}, GPT]}, "bad_turn"),
        ({"conversations": [HUMAN], "video": "a.mp4"}, "no_answer"),
        ({"conversations": [GPT, HUMAN], "video": "a.mp4"}, "no_answer"),
        (sample(video=7), "bad_media"),
        (sample(video=["a.mp4", "b.mp4"]), "bad_media"),
        (sample(image=["a.jpg", None]), "bad_media"),
        (sample(image={"bytes": "x"}), "bad_media"),
        (sample(image=" "), "bad_media"),
        (sample(video="a\0b.mp4"), "bad_media"),
        (sample(video="a.mp4", video_read_type="magic"), "bad_media"),
        (sample(video="a.mp4", start="soon"), "bad_clip"),
        (sample(video="a.mp4", start=True), "bad_clip"),
        *((sample(video="a.mp4", start=value), "bad_clip") for value in (math.nan, math.inf, "nan", 10**400)),
        *((sample(video="a.mp4", end=value), "bad_clip") for value in (math.nan, math.inf, "-inf", "Infinity")),
        (sample(video="a.mp4", start=-1), "bad_clip"),
        (sample(video="a.mp4", start=5, end=5), "bad_clip"),
        (sample(video="/etc/passwd"), "outside_root"),
        (sample(video="../a.mp4"), "outside_root"),
        (sample(image="a/b/../../../c.jpg"), "outside_root"),
        (sample(), "placeholder_mismatch"),
        (sample(image=["a.jpg", "b.jpg"]), "placeholder_mismatch"),
        ({"conversations": [{"from": "human", "value": "<video> <image>"}, GPT], "video": "a"}, "placeholder_mismatch"),
        ({"conversations": [{"from": "human", "value": "\ud800"}, GPT]}, "bad_sample"),
    ],
)
def test_reason(value, expected):
    assert reason(value) == expected


def test_half_a_utf16_pair_costs_its_sample_alone(tmp_path):
    whole = sample(image="a.jpg")
    half = sample(image="b.jpg", conversations=[HUMAN, {"from": "gpt", "value": "\ud83d"}])
    for name, text in (
        ("a.json", json.dumps([half, whole, half])),
        ("a.jsonl", f"{json.dumps(half)}\n{json.dumps(whole)}"),
    ):
        (tmp_path / name).write_text(text)
        read = list(read_annotations(tmp_path / name, entry(media_type="image")))
        assert [getattr(item, "reason", "") for item in read] == ["bad_sample", "", "bad_sample"][: len(read)]


@pytest.mark.parametrize(("media_type", "field"), [("text", "image"), ("image", "video"), ("video", "image")])
def test_media_that_the_entry_does_not_allow(media_type, field):
    assert reason(sample(**{field: "a.b"}), media_type=media_type) == "wrong_media"
    assert normalize(sample(**{field: "a.b"}), entry(media_type="mix"), 0).media


@given(st.lists(st.sampled_from(["..", ".", "a", "b", ""]), min_size=1, max_size=8))
def test_a_path_that_is_taken_stays_below_its_root(parts):
    """Walks the path step by step, which normalise does not."""
    path, depth, lowest = "/".join(parts), 0, 0
    for part in parts:
        depth += {"..": -1, ".": 0, "": 0}.get(part, 1)
        lowest = min(lowest, depth)
    outside = path.startswith("/") or depth < 0
    if path.strip():
        try:
            taken = normalize(sample(image=path), entry(), 0).media[0].path
        except AnnotationError as error:
            assert error.reason == "outside_root" and (outside or lowest < 0)
        else:
            assert not outside and not taken.startswith(("/", "..")) and ".." not in taken.split("/")


# Sampling grammar -----------------------------------------------------------------------------------------------------


# Files ----------------------------------------------------------------------------------------------------------------

SAMPLES = [sample(id=f"s{i}", video=f"{i}.mp4", score=i / 2) for i in range(10)]


def write(folder, name):
    path = folder / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(SAMPLES), path, row_group_size=3)
        return path
    lines = "\n".join(json.dumps(item) for item in SAMPLES) + "\n\n"
    data = (json.dumps(SAMPLES, indent=1) if ".jsonl" not in name else lines).encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = pa.compress(data, "zstd", asbytes=True)
    path.write_bytes(data)
    return path


FILES = ["a.json", "a.jsonl", "a.parquet", "a.json.gz", "a.jsonl.gz", "a.json.zst", "a.jsonl.zst"]


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same(tmp_path, name):
    path = write(tmp_path, name)
    assert count_samples(path) == len(SAMPLES)
    expected = [normalize(item, entry(), position) for position, item in enumerate(SAMPLES)]
    assert list(read_annotations(path, entry())) == expected
    assert list(read_annotations(path, entry(sampling="end:30%"))) == expected[7:]
    assert list(read_annotations(path, entry(sampling="first2:3"), limit=2)) == expected[3:5]


def test_bad_samples_come_with_their_place(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"id": "x", "video": "a.mp4"}) + "\n{broken\n" + json.dumps(SAMPLES[2]) + "\n[1]\n")
    found = list(read_annotations(path, entry(name="mine")))
    shown = [(item.reason, item.entry, item.position, item.id) for item in found if isinstance(item, AnnotationError)]
    assert shown == [
        ("no_conversations", "mine", 0, "x"),
        ("bad_sample", "mine", 1, "1"),
        ("bad_sample", "mine", 3, "3"),
    ]
    assert found[2].position == 2 and found[2].id == "s2"


@pytest.mark.parametrize(("name", "data"), [("a.json", b""), ("a.json", b" \n"), ("a.json", b"[]"), ("a.jsonl", b"\n")])
def test_empty_files_have_no_samples(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert list(read_annotations(tmp_path / name, entry())) == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.json", b'[{"id": 1}, {"id": 2'),
        ("a.json", b"<!doctype html>"),
        ("a.json", b'{"data": [{"id": 1}]}'),
        ("a.json", b'{"id": 1'),
        ("a.json", b"\x1f\x8bno gzip"),
        ("a.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"),
        ("a.parquet", b"no parquet"),
        ("a.json.gz", b"no gzip"),
        ("a.csv", b"id,video"),
    ],
)
def test_broken_files_are_named(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(AnnotationFileError, match=name.replace(".", r"\.")) as caught:
        list(read_annotations(path, entry()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("before", [b"", json.dumps({"conversations": [HUMAN, GPT]}).encode() + b"\n"])
def test_millions_of_values_that_are_no_samples_are_refused(tmp_path, before):
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress(before + b"{}\n" * (MAX_FOREIGN + 1)))
    for read in (lambda: sum(1 for _ in read_annotations(path, entry())), lambda: count_samples(path)):
        with pytest.raises(
            AnnotationFileError, match="more than 100,000 samples in a row have no conversations"
        ) as caught:
            read()
        assert str(path) in str(caught.value)
    path.write_bytes(gzip.compress(before + b"{}\n" * MAX_FOREIGN))
    assert count_samples(path) == MAX_FOREIGN + bool(before)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AnnotationFileError, match="no such annotation file"):
        list(read_annotations(tmp_path / "a.json", entry()))


def test_a_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(SAMPLES).encode())
    assert len(list(read_annotations(path, entry()))) == len(SAMPLES)


@pytest.mark.parametrize(
    ("turn", "good"),
    [
        ({"from": "human", "value": "Hi"}, True),
        ({"from": "gpt", "value": "Hi"}, True),
        ({"from": "user", "value": "Hi"}, False),
        ({"role": "user", "content": "Hi"}, False),
        ({"from": "system", "value": "Be brief."}, False),
    ],
)
def test_compat_published_takes_first_turns_by_two_names_alone(tmp_path, turn, good):
    rest = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello."}]
    (tmp_path / "a.json").write_text(json.dumps([{"conversations": [turn, *rest]}]))
    entry = EntryConfig(annotation="a.json")
    (meant,) = read_annotations(tmp_path / "a.json", entry)
    (found,) = read_annotations(tmp_path / "a.json", entry, compat="published")
    assert isinstance(meant, Annotation)
    assert (found == meant) if good else (found.reason == "bad_turn" and "human or gpt" in str(found))
