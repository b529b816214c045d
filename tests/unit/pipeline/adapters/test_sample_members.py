"""Samples as other readers hand them over: the same frames, seconds and dialogues as by byte offset."""

from __future__ import annotations

import io
import json
import tarfile

import pytest
import torch

from framestream.pipeline.adapters import Sample, SampleError, ShardDataset, read_members
from framestream.pipeline.adapters.sample_members import read_dialogue
from framestream.pipeline.config.preprocessing import FramesConfig
from tests.helpers.corpora.real_root import build

pytestmark = pytest.mark.slow

SMALL = FramesConfig(sampler="dynamic_fps1", min=4, max=8, size=64)


def members_of(root, folder: str) -> dict[str, dict[str, bytes]]:
    """Members of every sample of a folder's train shards, by key."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted((root / folder).glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return found


@pytest.mark.parametrize("frames", [None, 4, 10, 64, SMALL])
def test_media_are_what_the_data_set_gives(footage_root, frames):
    dataset = ShardDataset(footage_root, by="media", frames=frames)
    found = members_of(footage_root, "video") | members_of(footage_root, "image")
    assert len(found) == len(dataset) == 6
    for sample in dataset:
        (item,) = sample.media
        read = read_members(found[item.key], frames)
        assert torch.equal(read.media[0].frames, item.frames)
        assert torch.equal(read.media[0].timestamps, item.timestamps)
        assert read.media[0][2:] == item[2:] and read.dialogues == sample.dialogues


def test_frames_keep_their_aspect_where_they_are_stored_so(tmp_path):
    stored = {"sampler": "middle", "min": 4, "max": 8, "size": 112, "resize": "short_side"}
    root = build(tmp_path, frames=stored)
    found = members_of(root, "video")
    half = FramesConfig(**{**stored, "size": 56, "max": 4})
    square = FramesConfig(sampler="middle", min=4, max=4, size=56)
    shapes = {None: (8, 112, 264, 3), half: (4, 56, 132, 3), square: (4, 56, 56, 3)}  # 640 x 272 pixels
    for frames, shape in shapes.items():
        dataset = ShardDataset(root, by="media", frames=frames)
        assert dataset[0].media[0].frames.shape == shape
        for sample in dataset:
            (item,) = sample.media
            if item.kind == "video":
                assert torch.equal(read_members(found[item.key], frames).media[0].frames, item.frames)


def test_dialogues_are_what_the_data_set_gives(footage_root):
    found = members_of(footage_root, "dialogue")
    for sample in ShardDataset(footage_root):
        members, dialogues = found[sample.dialogues[0].key], sample.dialogues
        assert read_dialogue(members) == (dialogues[0], [item.key for item in sample.media])
        if not sample.media:
            assert read_members(members) == Sample([], dialogues)
            continue
        with pytest.raises(
            SampleError, match=rf"^{dialogues[0].key}: is about {len(sample.media)} media, .*stream_members"
        ):
            read_members(members)


def test_members_may_come_in_any_reader_s_wrapping(footage_root):
    key, members = next(iter(members_of(footage_root, "video").items()))
    plain = read_members(members, 4)
    wrappings = [
        {f".{name}": io.BytesIO(data) for name, data in members.items()} | {"__index__": 0, "__key__": key},
        {"mp4": {"bytes": members["mp4"], "path": None}, "json": json.loads(members["json"]), "__url__": "x"},
        {"mp4": bytearray(members["mp4"]), "json": members["json"].decode()},
    ]
    for wrapped in wrappings:
        read = read_members(wrapped, 4)
        assert torch.equal(read.media[0].frames, plain.media[0].frames)
        assert read.media[0][2:] == plain.media[0][2:] and read.dialogues == plain.dialogues


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda members: members.pop("json"), "a sample: has no 'json'"),
        (lambda members: members.pop("mp4"), "v[0-9a-f]{24}: has no 'mp4'"),
        (lambda members: members.update(mp4=members["mp4"][:1000]), "v[0-9a-f]{24}: "),
        (lambda members: members.update(mp4=b"\xff" * 2000), "v[0-9a-f]{24}: not an MP4"),
        (lambda members: members.update(mp4=None), "v[0-9a-f]{24}: "),
        (lambda members: members.update(json=b"{"), "a sample: "),
    ],
)
def test_what_is_no_sample_is_said_in_one_line(footage_root, change, message):
    members = dict(next(iter(members_of(footage_root, "video").values())))
    change(members)
    with pytest.raises(SampleError, match=rf"^{message}[^\n]*$"):
        read_members(members, 4)


def test_frames_that_the_json_does_not_count_are_refused(footage_root):
    members = dict(next(iter(members_of(footage_root, "video").values())))
    facts = json.loads(members["json"])
    facts["frame_index"] = facts["frame_index"][:-1]
    with pytest.raises(SampleError, match="the mp4 has 16 frames, the json 15"):
        read_members({**members, "json": json.dumps(facts)})


@pytest.mark.parametrize(("folder", "extension"), [("video", "mp4"), ("image", "jpg")])
def test_a_flipped_bit_of_a_medium_is_an_error(footage_root, folder, extension):
    members = dict(next(iter(members_of(footage_root, folder).values())))
    data = bytearray(members[extension])
    data[len(data) * 2 // 3] ^= 4
    with pytest.raises(SampleError, match="damaged .its sha256 is not the one in the json"):
        read_members({**members, extension: bytes(data)}, 4)


@pytest.mark.parametrize("value", [None, -1, 10**30, float("inf"), [], {}, "x"])
@pytest.mark.parametrize(
    "field", ["width", "height", "vlen", "fps", "duration", "frame_index", "timestamps", "dialogues"]
)
def test_metadata_of_odd_values_never_ends_in_another_error(footage_root, field, value):
    members = dict(next(iter(members_of(footage_root, "video").values())))
    changed = json.dumps(json.loads(members["json"]) | {field: value})
    try:
        read_members({**members, "json": changed}, 4)
    except SampleError as error:
        assert "\n" not in str(error)
