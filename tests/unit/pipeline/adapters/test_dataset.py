"""Random access: which frames are shown, at which seconds, with which dialogues, in this process and in workers."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from framestream.pipeline.adapters import ShardDataset
from framestream.pipeline.adapters.frame_selection import choose_stored_frames
from framestream.pipeline.adapters.types import SampleError
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.shards.index import MEDIA_SCHEMA, NOMINAL, Index, ShardsError, write_index
from framestream.pipeline.shards.media_view import MediaViews
from tests.helpers.corpora.small_root import Root, manifest, mixed_root, turns

FPS = 2.0


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return mixed_root(tmp_path_factory.mktemp("dataset")) / "stage2"


def shown(frames: torch.Tensor) -> list[int]:
    """Numbers of the source frames whose colours are seen; see small_root.colour."""
    means = frames.float().mean(dim=(1, 2))
    return [round((c[0] - 8) / 8) + 30 * round((c[1] - 8) / 8) for c in means.tolist()]


@pytest.mark.parametrize("count", [1, 4, 5, 8, 13, 16, 37, 64, 512])
def test_frames_are_the_nearest_and_have_their_true_seconds(root, count):
    dataset = ShardDataset(root, by="media", frames=count)
    for number in range(len(dataset)):
        (item,) = dataset[number].media
        if item.kind == "image":
            continue
        assert item.frames.dtype == torch.uint8 and item.frames.shape == (count, 64, 64, 3)
        assert item.timestamps.dtype == torch.float64 and item.timestamps.shape == (count,)
        there = shown(item.frames)
        assert item.timestamps.tolist() == [frame / FPS for frame in there]
        stored = dataset.index.media["frame_index"][int(dataset._rows[number])].as_py()
        vlen = dataset.index.media["vlen"][int(dataset._rows[number])].as_py()
        parts = min(count, vlen)
        edges = [part * vlen // parts for part in range(parts + 1)]
        wanted = [(low + high - 1) // 2 for low, high in zip(edges[:-1], edges[1:], strict=True)]
        wanted += [wanted[-1]] * (count - parts)
        assert there == [min(stored, key=lambda f: (abs(f - w), f)) for w in wanted]


def test_without_a_number_each_stored_frame_is_shown_once(root):
    dataset = ShardDataset(root, by="media")
    stored = {row["key"]: row["frame_index"] for row in dataset.index.media.to_pylist() if row["kind"] == "video"}
    for sample in dataset:
        (item,) = sample.media
        if item.kind == "video":
            assert shown(item.frames) == stored[item.key]


@given(data=st.data(), count=st.integers(1, 600))
def test_a_shown_frame_is_off_by_half_a_gap_at_most(data, count):
    vlen = data.draw(st.integers(1, 5000))
    stored = np.array(sorted(data.draw(st.sets(st.integers(0, vlen - 1), min_size=1, max_size=600))))
    indices = choose_stored_frames(count, stored, vlen, 25.0, vlen / 25, 0)
    every = choose_stored_frames(count, np.arange(vlen), vlen, 25.0, vlen / 25, 0)
    assert len(indices) == len(every) == count and (np.diff(indices) >= 0).all()
    off = np.abs(stored[indices] - every)
    assert (off == np.abs(stored[:, None] - every).min(axis=0)).all()
    inside = (every >= stored[0]) & (every <= stored[-1])
    assert (off[inside] * 2 <= max(np.diff(stored), default=0)).all()


@pytest.mark.parametrize("sampler", ["middle", "dynamic_fps1", "fps1", "rand"])
def test_manifest_frames_are_those_the_trainer_is_given(root, sampler):
    made = manifest(
        root.parent,
        frames__sampler=sampler,
        frames__min=4,
        frames__max=16,
        frames__size=32,
        model__vision_tower__patch=4,
    )
    media_views, dataset = MediaViews(Index.open(root), made), ShardDataset(root, by="media", frames=made.frames)
    for number, row in enumerate(dataset._rows.tolist()):
        (view,) = media_views.views([row])
        if view.kind == "video":
            out = np.empty((len(view.frame_indices), 32, 32, 3), dtype=np.uint8)
            media_views.read_frames(view, 0, out)
            assert np.array_equal(dataset[number].media[0].frames.numpy(), out)


def test_a_dialogue_has_its_media_in_order(root):
    dataset = ShardDataset(root, frames=4)
    index = dataset.index
    rows = [row for row in index.dialogues.to_pylist() if row["split"] == "train"]
    assert len(dataset) == len(rows)
    for number, (sample, row) in enumerate(zip(dataset, rows, strict=True)):
        (dialogue,) = sample.dialogues
        assert dataset.key(number) == dialogue.key == row["key"]
        assert (dialogue.turns, dialogue.id, dialogue.entry) == (
            json.loads(row["conversations"]),
            row["id"],
            row["entry"],
        )
        keys = [index.media["key"][item].as_py() for item in row["media"]]
        assert [item.key for item in sample.media] == keys
    assert {len(sample.media) for sample in dataset} == {0, 1, 2}


def test_a_media_item_has_the_dialogues_about_it_alone(root):
    dataset = ShardDataset(root, by="media", frames=4)
    rows = dataset.index.dialogues.to_pylist()
    keys = dataset.index.media["key"].to_pylist()
    about = 0
    for number, sample in enumerate(dataset):
        (item,) = sample.media
        alone = [r["key"] for r in rows if r["split"] == "train" and [keys[m] for m in r["media"]] == [item.key]]
        assert [dialogue.key for dialogue in sample.dialogues] == alone
        assert dataset.key(number) == item.key
        about += len(alone)
    assert about == sum(r["split"] == "train" and len(r["media"]) == 1 for r in rows)
    assert any(r["split"] == "val" and len(r["media"]) == 1 for r in rows)


def test_images_have_their_full_size(root):
    images = [m for sample in ShardDataset(root, by="media") for m in sample.media if m.kind == "image"]
    assert {tuple(image.frames.shape) for image in images} >= {(1, 60, 150, 3), (1, 140, 50, 3), (1, 20, 30, 3)}
    for image in images:
        assert image.timestamps.tolist() == [0.0] and image.duration == 0
        corner = image.frames[0, :4, :4].float().mean(dim=(0, 1))
        assert (corner - torch.tensor([200.0, 20.0, 20.0])).abs().max() < 6


def same(one, other) -> bool:
    return one[1] == other[1] and all(
        torch.equal(a.frames, b.frames) and torch.equal(a.timestamps, b.timestamps) and a[2:] == b[2:]
        for a, b in zip(one.media, other.media, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_what_this_process_reads(root, context):
    dataset = ShardDataset(root, frames=8)
    loader = DataLoader(dataset, batch_size=3, collate_fn=list, num_workers=2, multiprocessing_context=context)
    read = [sample for batch in loader for sample in batch]
    assert len(read) == len(dataset) and all(map(same, read, dataset))


def test_it_travels_without_its_index(root):
    dataset = ShardDataset(root, by="media", frames=FramesConfig(sampler="middle", min=4, max=4, size=32))
    data = pickle.dumps(dataset)
    assert len(data) < 1000
    assert all(map(same, pickle.loads(data), dataset))


def test_numbers_beyond_the_end_are_refused(root):
    dataset = ShardDataset(root, frames=4)
    assert same(dataset[-1], dataset[len(dataset) - 1])
    for number in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[number]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"by": "clip"}, "'clip' is not dialogue or media"),
        ({"frames": 0}, "frames: 0 is not a number of frames"),
        ({"frames": True}, "frames: True is not a number"),
        ({"split": "test"}, "no dialogue of split test"),
    ],
)
def test_wrong_arguments_are_refused(root, arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardDataset(root, **arguments)


def test_nothing_built_is_said_so(tmp_path):
    with pytest.raises(ShardsError, match="no finished shards here"):
        ShardDataset(tmp_path / "stage1")


def test_a_damaged_frame_names_its_shard_and_member(tmp_path):
    made = Root(tmp_path)
    for video in (made.video(8, 8), made.video(8, 8)):
        made.dialogue(turns("<image>\nWhat?", "That."), [video])
    stage = made.write() / "stage2"
    dataset = ShardDataset(stage, frames=8)
    row = dataset.index.media.slice(1, 1).to_pylist()[0]
    path = dataset.index.shard_path(row["shard"])
    data = bytearray(path.read_bytes())
    data[row["frame_offset"][3] : row["frame_offset"][3] + 20] = bytes(20)
    path.write_bytes(data)
    assert dataset[0].media
    with pytest.raises(SampleError, match=rf"{path.name}: {row['key']}\.mp4: "):
        dataset[1]
    path.unlink()
    with pytest.raises(SampleError, match=path.name):
        ShardDataset(stage, frames=8)[1]


def test_a_root_of_the_published_readers_shows_what_it_stores(tmp_path):
    made = Root(tmp_path)
    made.dialogue(turns("<image>\nWhat?", "That."), [made.video(8, 8)])
    stage = made.write() / "stage2"
    index = Index.open(stage)
    media = index.media.append_column(NOMINAL, [[list(range(8))]])
    assert media.schema.names[:-1] == MEDIA_SCHEMA.names
    fingerprint = write_index(stage, media, index.dialogues, index.shards)
    record = {"index_fingerprint": fingerprint, "specification": {"compat": "published"}}
    (stage / "build.json").write_text(json.dumps(record))
    assert shown(ShardDataset(stage)[0].media[0].frames) == list(range(8))
    with pytest.raises(ShardsError, match="compat: published"):
        ShardDataset(stage, frames=4)
