"""Megatron-Energon: the shards as they are, a sample at a time; its multi-storage client reads remote ones."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from megatron import energon
from megatron.energon.av import AVDecoder

from benchmarks.loading.media import BenchmarkMedia


@energon.stateless
def _keep(sample: dict[str, Any]) -> energon.CrudeSample:
    return energon.CrudeSample(sample)


class _Task(energon.DefaultTaskEncoder):
    """Members as bytes."""

    decoder = None
    cookers = [energon.Cooker(_keep)]


def open_samples(media: BenchmarkMedia, folder: Path, address: str | None) -> Callable[[], Iterator[bytes]]:
    """What hands out the MP4 of every medium, in order, at each call."""
    where: Path | str = media.root / "video"
    if address is not None:
        where = f"msc://far/{media.root.relative_to(media.folder)}/video"
        _configure(address, folder)
    alone = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    settings = {"split_part": "train", "batch_size": None, "task_encoder": _Task()}
    loader = energon.get_loader(energon.get_val_dataset(where, worker_config=alone, **settings))
    return lambda: (sample["mp4"] for sample in loader)


def decode_frames(mp4: bytes, places: list[int], out: np.ndarray) -> np.ndarray:
    """Frames (T, H, W, 3) uint8 by its AVDecoder: one clip where they follow each other, else a clip each."""
    first, last = places[0], places[-1]
    ranges = [(first, last)] if last - first + 1 == len(places) else [(place, place) for place in places]
    clips, _ = AVDecoder(io.BytesIO(mp4), suppress_warnings=True).get_video_clips(ranges, video_unit="frames")
    return np.concatenate([clip.permute(0, 2, 3, 1).numpy() for clip in clips])


def _configure(address: str, folder: Path) -> None:
    """A profile of its storage client: the bucket at ``address``."""
    endpoint, _, bucket = address.rpartition("/")
    options = {"endpoint_url": endpoint, "base_path": bucket, "region_name": "us-east-1"}
    key = {"type": "S3Credentials", "options": {"access_key": "any", "secret_key": "any"}}
    profile = {"storage_provider": {"type": "s3", "options": options}, "credentials_provider": key}
    (folder / "msc.json").write_text(json.dumps({"profiles": {"far": profile}}))
    os.environ["MSC_CONFIG"] = str(folder / "msc.json")
