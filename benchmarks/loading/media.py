"""Media of the reader benchmark: real footage as a shard root of this project, which other readers open too."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import from_dict
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg
from framestream.pipeline.media.resize import resize
from framestream.pipeline.media.sampling import frame_indices
from framestream.pipeline.shards.index import (
    DIALOGUE_SCHEMA,
    MEDIA_SCHEMA,
    SHARD_SCHEMA,
    Index,
    build_table,
    write_index,
)
from framestream.pipeline.shards.samples import dialogue_key, media_key, media_metadata
from framestream.pipeline.shards.sidecars import write_sidecars
from framestream.pipeline.shards.writer import ShardWriter
from framestream.pipeline.utils.digests import frame_digest
from tests.helpers.golden_data import TOKENIZER
from tests.helpers.media.footage import FOOTAGE

SHARD_MEDIA = 6  #: media in a shard: 57 MB with 512 frames of 224 pixels
EPOCH_FRAMES = 6144  #: minimum frames of an epoch of ``build_loader``, so that its start and end have little weight
TURNS = [
    {"from": "human", "value": "<image>\nDescribe what happens, from the beginning to the end."},
    {"from": "gpt", "value": "A rabbit comes out of its burrow, stretches, and looks at the butterfly on a flower."},
]


@dataclass(frozen=True)
class BenchmarkMedia:
    """``count`` videos in ``folder``, each of ``frames`` frames of ``size`` x ``size`` pixels, one a second."""

    folder: Path
    count: int
    frames: int
    size: int

    @property
    def root(self) -> Path:
        """The shard root, with one dialogue about each medium."""
        return self.folder / "shards1" / "stage3"

    def frame_numbers(self, count: int) -> list[int]:
        """Return the stored frames that every reader reads: the middles of ``count`` equal parts."""
        return frame_indices("middle", self.frames, 1.0, self.frames, count, count, 4).tolist()

    def samples(self) -> Iterator[tuple[str, bytes]]:
        """Yield key and MP4 of every medium."""
        index = Index.open(self.root)
        for row in index.media.select(["key", "shard", "offset", "size"]).to_pylist():
            with open(index.shard_path(row["shard"]), "rb") as file:
                file.seek(row["offset"])
                yield row["key"], file.read(row["size"])

    def manifest(self, count: int, threads: int) -> Manifest:
        """Return a manifest that samples ``count`` frames of each medium into rows of 32,768 tokens, as stage 3 does.

        Its root has several dialogues about each medium if an epoch would otherwise be shorter than ``EPOCH_FRAMES``.
        """
        dialogues = -(-EPOCH_FRAMES // (self.count * count))
        shards = self.folder / f"shards{dialogues}"
        if not shards.exists():
            _write_index(self, shards / "stage3", dialogues)
        value = {
            "stage": 3,
            "output": str(self.folder / "run"),
            "shards": str(shards),
            "data": {"entries": [{"annotation": "footage.json"}]},
            "frames": {"sampler": "middle", "min": count, "max": count, "size": self.size},
            "text": {"tokenizer": str(TOKENIZER)},
            "batching": {"global_batch": 8, "row_multiple": 1, "cost": {"patch": 1.0, "token": 1.0, "pair": 0.0}},
            "loader": {"threads": threads},
            "model": {"vision_tower": {"patch": max(n for n in range(1, self.size // 8 + 1) if self.size % n == 0)}},
            "init_from": {"vision_tower": "random", "connector": "random", "language_model": "random"},
            "train": {part: {"train": True, "lr": 1e-3} for part in ("vision_tower", "connector", "language_model")},
        }
        return from_dict(Manifest, value, "benchmark")


def write_media(folder: Path, count: int, frames: int, size: int) -> BenchmarkMedia:
    """Write loops of real footage as a shard root in ``folder``; no two frames have the same bytes.

    Each frame of the root is a frame of the footage, shifted sideways. The shift in pixels differs between loops and
    between videos.
    """
    media = BenchmarkMedia(folder, count, frames, size)
    footage = _footage(size)
    (media.root / "video").mkdir(parents=True)
    rows, shards = [], []
    for first in range(0, count, SHARD_MEDIA):
        path = media.root / "video" / f"train-{len(shards):06d}.tar"
        with ShardWriter(path) as writer:
            for number in range(first, min(first + SHARD_MEDIA, count)):
                rows.append({**_add(writer, media, footage, number), "shard": len(shards)})
        shards.append(writer.info)
    write_sidecars(media.root / "video", shards)
    facts = [
        {
            "folder": "video",
            "split": "train",
            "name": s.name,
            "samples": s.samples,
            "bytes": s.bytes,
            "sha256": s.sha256,
        }
        for s in shards
    ]
    _write_tables(media.root, rows, facts, 1)
    return media


@functools.cache
def _footage(size: int) -> list[np.ndarray]:
    with av.open(str(FOOTAGE / "bigbuckbunny.mp4")) as container:
        return [resize(frame.to_ndarray(format="rgb24"), size, size) for frame in container.decode(video=0)]


def _add(writer: ShardWriter, media: BenchmarkMedia, footage: list[np.ndarray], number: int) -> dict:
    """Add video ``number`` to a shard; return its row of the index without the shard number."""
    jpegs = []
    for position in range(media.frames):
        loop, frame = divmod(position, len(footage))
        shifted = np.roll(footage[frame], loop * media.count + number, axis=1)
        jpegs.append(encode_jpeg(shifted, 90, "420"))
    seconds = np.arange(media.frames, dtype=np.float64)
    mp4 = mux_mjpeg(jpegs, seconds, media.frames, media.size, media.size)
    key = media_key("video", f"footage {number}")
    facts = {
        "key": key,
        "kind": "video",
        "source": f"footage-{number}.mp4",
        "start": 0.0,
        "width": media.size,
        "height": media.size,
        "source_width": 1280,
        "source_height": 720,
        "vlen": media.frames,
        "fps": 1.0,
        "duration": float(media.frames),
        "sample": list(range(media.frames)),
        "frame_index": list(range(media.frames)),
        "timestamps": seconds.tolist(),
        "sha256": "",
    }
    start, length = writer.add(key, {"mp4": mp4, "json": media_metadata(**facts, salvaged=False)})["mp4"]
    offsets, sizes, _ = mjpeg_frames(mp4)
    ranges = {"offset": start, "size": length, "frame_offset": offsets + start, "frame_size": sizes}
    return {**facts, **ranges, "frame_digest": list(map(frame_digest, jpegs)), "split": "train"}


def _write_tables(root: Path, media: list[dict], shards: list[dict], dialogues: int) -> None:
    """Write build.json and the index with ``dialogues`` dialogues about each medium."""
    rows = [
        {
            "key": dialogue_key(f"dialogue {number}"),
            "split": "train",
            "entry": "footage",
            "id": str(number),
            "media": [number % len(media)],
            "conversations": json.dumps(TURNS),
            "meta": "{}",
        }
        for number in range(dialogues * len(media))
    ]
    tables = build_table(MEDIA_SCHEMA, media), build_table(DIALOGUE_SCHEMA, rows), build_table(SHARD_SCHEMA, shards)
    (root / "build.json").write_text(json.dumps({"index_fingerprint": write_index(root, *tables)}))


def _write_index(media: BenchmarkMedia, root: Path, dialogues: int) -> None:
    """Write another root with the same shards and its own index."""
    index = Index.open(media.root)
    (root / "video").mkdir(parents=True)
    for path in (media.root / "video").glob("*.tar"):
        os.link(path, root / "video" / path.name)
    _write_tables(root, index.media.to_pylist(), index.shards.to_pylist(), dialogues)
