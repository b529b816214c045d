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
from tests.helpers.servers.remote_roots import KINDS, served_root

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


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_root_costs_a_request_for_each_shard(footage_root, kind):
    wanted = {name(sample): sample for sample in stream_members(footage_root, 4, by="media")}
    with served_root(kind, footage_root) as (address, asked):
        read = list(stream_members(address, 4, by="media"))
        paths = [path.partition("?")[0] for path in asked()] if asked else []
        forked = list(DataLoader(stream_members(address, 4, by="media"), batch_size=None, num_workers=1))
    assert [name(sample) for sample in forked] == [name(sample) for sample in read] and len(read) == 6
    assert all(equal(sample, wanted[name(sample)]) for sample in read + forked)
    shards = sorted("/".join(path.split("/")[-2:]) for path in paths if path.endswith(".tar") and "/cdn/" not in path)
    assert shards == (["image/train-000000.tar", "video/train-000000.tar"] if asked else [])


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


@pytest.mark.parametrize("where", ["sample", "shard"])
def test_a_handler_that_says_stop_ends_the_pass(copied, where):
    """As in webdataset's own stages: True goes on without the sample or shard, False ends the pass there."""
    shard = copied / "video" / "train-000000.tar"
    data = bytearray(shard.read_bytes())
    data[40_000:40_100] = bytes(100)
    shard.write_bytes(data if where == "sample" else bytes(512) + data[512:])
    found = {}
    for answer in (True, False):
        stream = stream_members(copied, 1, by="media", shuffle_mb=0, handler=lambda error, answer=answer: answer)
        orders = [[sample.media[0].key for sample in stream] for _ in range(2)]
        assert orders[0] == orders[1]
        found[answer] = orders[0]
    assert len(found[True]) == (5 if where == "sample" else 3)
    assert len(found[False]) < len(found[True]) and found[True][: len(found[False])] == found[False]


def test_a_handler_that_says_stop_keeps_the_shuffle_buffer(copied):
    shard = copied / "image" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-20_000])
    counts = []
    for seed in range(16):
        first, second = (stream_members(copied, 1, by="media", seed=seed, handler=lambda error: False) for _ in "ab")
        counts.append(len(list(first.stage(0)())))  # what is read before the damaged shard is met
        assert len(list(second)) == counts[-1]
    assert max(counts) > 0


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
