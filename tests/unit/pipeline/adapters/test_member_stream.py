"""Shards read in order: every dialogue once with its media, for any number of ranks and workers, from any root."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from framestream.pipeline.adapters import SampleError, ShardDataset, read_members, stream_members
from tests.helpers.servers.web_server import Server

pytestmark = pytest.mark.slow


def equal(one, other) -> bool:
    """Whether two samples are the same, with their frames."""
    same = one.dialogues == other.dialogues and len(one.media) == len(other.media)
    pairs = list(zip(one.media, other.media, strict=True)) if same else []
    return same and all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2:] == b[2:] for a, b in pairs)


def name(sample) -> str:
    return sample.dialogues[0].key if sample.dialogues else sample.media[0].key


@pytest.mark.parametrize("shuffle_mb", [0, 256])
@pytest.mark.parametrize(("by", "split"), [("dialogue", "train"), ("dialogue", "val"), ("media", "train")])
def test_all_samples_are_those_of_the_data_set(footage_root, by, split, shuffle_mb):
    dataset = ShardDataset(footage_root, by=by, frames=8, split=split)
    wanted = {name(sample): sample for sample in dataset}
    read = list(stream_members(footage_root, 8, by=by, split=split, shuffle_mb=shuffle_mb))
    assert len(read) == len(dataset) and {name(sample) for sample in read} == wanted.keys()
    assert all(equal(sample, wanted[name(sample)]) for sample in read)


@pytest.mark.parametrize("workers", [1, 3])
def test_more_workers_than_shards_divide_the_samples(footage_root, workers):
    wanted = {sample.dialogues[0].key for sample in ShardDataset(footage_root, frames=4)}
    loader = DataLoader(stream_members(footage_root, 4), batch_size=None, num_workers=workers, persistent_workers=True)
    orders = [[sample.dialogues[0].key for sample in loader] for _ in range(2)]
    assert all(sorted(order) == sorted(wanted) for order in orders) and orders[0] != orders[1]


@pytest.mark.parametrize("ranks", [2, 5])
def test_ranks_divide_the_samples(footage_root, monkeypatch, ranks):
    wanted, found = Counter(s.dialogues[0].key for s in ShardDataset(footage_root, frames=1)), Counter()
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        found += Counter(sample.dialogues[0].key for sample in stream_members(footage_root, 1))
    assert found == wanted


def test_a_seed_gives_one_order_for_each_epoch(footage_root):
    def order(seed: int, epoch: int) -> list[str]:
        stream = stream_members(footage_root, 1, seed=seed)
        stream.stage(0).set_epoch(epoch)
        return [sample.dialogues[0].key for sample in stream]

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*which)) for which in ((0, 0), (0, 1), (1, 0))}) == 3


def test_a_remote_shard_costs_one_request(footage_root):
    with Server() as server:
        for path in footage_root.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                server.routes[f"/root/{path.relative_to(footage_root)}"] = lambda request, data=data: request.serve(
                    data
                )
        read = list(stream_members(f"{server.url}/root", 4, by="media"))
        shards = [asked for asked, _ in server.asked if asked.endswith(".tar")]
    assert len(read) == 6 and sorted(shards) == ["/root/image/train-000000.tar", "/root/video/train-000000.tar"]


@pytest.fixture
def copied(footage_root: Path, tmp_path: Path) -> Path:
    """A root that a test may damage."""
    shutil.copytree(footage_root, tmp_path / "stage2")
    return tmp_path / "stage2"


def test_a_damaged_sample_is_named_or_left_out(copied):
    shard = copied / "video" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[40_000:40_100] = bytes(100)
    shard.write_bytes(data)
    with pytest.raises(SampleError, match="damaged"):
        list(stream_members(copied, 4, by="media"))
    with pytest.warns(UserWarning, match="damaged"):
        left = list(stream_members(copied, 4, by="media", handler=webdataset.warn_and_continue))
    assert len(left) == 5


def test_a_shard_that_ends_early_is_named(copied):
    shard = copied / "image" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:20_000])
    with pytest.raises(SampleError, match=r"image/train-000000\.tar: "):
        list(stream_members(copied, 4, by="media", shuffle_mb=0))


def test_a_dialogue_without_its_media_is_refused(footage_root):
    faults = 0
    for members in webdataset.WebDataset(str(footage_root / "dialogue" / "train-000000.tar"), shardshuffle=False):
        try:
            assert "<image>" not in str(read_members(members).dialogues)
        except SampleError as error:
            faults += 1
            assert "stream_members" in str(error) and members["__key__"] in str(error)
    assert faults == 7


def test_settings_are_checked(footage_root):
    for settings in ({"shuffle_mb": -1}, {"by": "video"}, {"frames": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            stream_members(footage_root, **settings)
