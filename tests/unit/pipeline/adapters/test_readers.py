"""One root as every reader gives it: the same keys, JSON fields and frames.

Frames go through ffmpeg (PyAV, Energon's AVDecoder) for the other readers and through libjpeg-turbo here: their chroma
upsampling differs, by less than 2 levels on average on this footage.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.adapters import ShardDataset
from tests.helpers.format_reader import Reader

FOLDERS = {"video": "mp4", "image": "jpg", "dialogue": None}

#: (key, JSON as parsed, bytes of the mp4 or jpg or none) of each sample of a folder's train shards
Samples = Iterator[tuple[str, dict[str, Any], bytes | None]]


def by_webdataset(folder: Path, extension: str | None, scratch: Path) -> Samples:
    import webdataset

    shards = [str(path) for path in sorted(folder.glob("train-*.tar"))]
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        yield sample["__key__"], json.loads(sample["json"]), sample[extension] if extension else None


def by_wids(folder: Path, extension: str | None, scratch: Path) -> Samples:
    import wids

    dataset = wids.ShardListDataset(str(folder / "shardindex.json"), cache_dir=str(scratch), transformations=[])
    for number in range(len(dataset)):
        sample = dataset[number]
        data = sample[f".{extension}"].read() if extension else None
        yield sample["__key__"], json.loads(sample[".json"].read()), data


def by_datasets(folder: Path, extension: str | None, scratch: Path) -> Samples:
    datasets = pytest.importorskip("datasets")
    files = {"train": str(folder / "train-*.tar")}
    loaded = datasets.load_dataset("webdataset", data_files=files, split="train", cache_dir=str(scratch))
    feature = {"mp4": datasets.Video, "jpg": datasets.Image}.get(extension)
    loaded = loaded.cast_column(extension, feature(decode=False)) if feature else loaded
    for sample in loaded:
        yield sample["__key__"], sample["json"], sample[extension]["bytes"] if extension else None


def by_energon(folder: Path, extension: str | None, scratch: Path) -> Samples:
    energon = pytest.importorskip("megatron.energon")

    class Task(energon.DefaultTaskEncoder):
        decoder = None
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    made = energon.get_val_dataset(
        folder, split_part="train", worker_config=alone, batch_size=None, task_encoder=Task()
    )
    for sample in energon.get_loader(made):
        yield sample["__key__"], json.loads(sample["json"]), sample[extension] if extension else None


READERS = [
    by_webdataset,
    by_wids,
    pytest.param(by_datasets, marks=pytest.mark.peers),
    pytest.param(by_energon, marks=pytest.mark.peers),
]


def ffmpeg_frames(mp4: bytes) -> tuple[np.ndarray, np.ndarray]:
    """All frames (T, H, W, 3) uint8 of a video and their seconds, through ffmpeg."""
    with av.open(io.BytesIO(mp4)) as container:
        frames = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    return np.stack([frame for frame, _ in frames]), np.array([second for _, second in frames])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    """Mean difference in levels."""
    assert one.shape == other.shape
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean())


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_gives_the_same(footage_root, tmp_path, reader: Callable[..., Samples], folder):
    index = Reader(footage_root)
    rows = [row for row in (index.dialogues if folder == "dialogue" else index.media).to_pylist()]
    rows = {row["key"]: row for row in rows if row["split"] == "train" and row.get("kind", folder) == folder}
    shown = {} if folder == "dialogue" else {s.media[0].key: s.media[0] for s in ShardDataset(footage_root, by="media")}
    read = list(reader(footage_root / folder, FOLDERS[folder], tmp_path))
    assert [key for key, _, _ in read] == list(rows)
    for key, facts, data in read:
        row = rows[key]
        for name in facts.keys() & row.keys():
            value = row[name]
            if folder == "dialogue" and name == "media":
                value = json.dumps([index.media["key"][item].as_py() for item in value], separators=(",", ":"))
            assert facts[name] == value, name
        if folder == "dialogue":
            continue
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        ours = shown[key].frames.numpy()
        if folder == "image":
            assert difference(np.asarray(Image.open(io.BytesIO(data)))[None], ours) <= 2
            continue
        frames, seconds = ffmpeg_frames(data)
        assert difference(frames, ours) <= 2
        assert difference(frames[1:], ours[:-1]) > 2, "the footage moves more than decoders differ"
        assert np.abs(seconds - facts["timestamps"]).max() <= 1 / 90_000
        assert shown[key].timestamps.tolist() == facts["timestamps"]


def test_all_fields_are_of_one_type_in_every_sample(footage_root, tmp_path):
    for folder, extension in FOLDERS.items():
        samples = list(by_webdataset(footage_root / folder, extension, tmp_path))
        assert len({tuple((name, type(value)) for name, value in facts.items()) for _, facts, _ in samples}) == 1


@pytest.mark.peers
def test_energon_decodes_the_frames_that_are_asked_for(footage_root):
    energon = pytest.importorskip("megatron.energon")

    class Task(energon.DefaultTaskEncoder):  # members decoded by Energon: an AVDecoder
        cookers = [energon.Cooker(energon.stateless(lambda sample: sample))]

    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    made = energon.get_val_dataset(
        footage_root / "video", split_part="train", worker_config=alone, batch_size=None, task_encoder=Task()
    )
    shown = {s.media[0].key: s.media[0].frames.numpy() for s in ShardDataset(footage_root, by="media")}
    count = 0
    for sample in energon.get_loader(made):
        clips, _ = sample["mp4"].get_video_clips([(3, 6), (12, 12)], video_unit="frames")
        ours = shown[sample["__key__"]]
        for clip, part in zip(clips, (slice(3, 7), slice(12, 13)), strict=True):
            assert difference(clip.permute(0, 2, 3, 1).numpy(), ours[part]) <= 2
        count += 1
    assert count == 3
