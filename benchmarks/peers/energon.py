"""Megatron-Energon: reads the shards unchanged, one sample at a time, and remote ones by its multi-storage client."""

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
def _to_crude_sample(sample: dict[str, Any]) -> energon.CrudeSample:
    return energon.CrudeSample(sample)


class _Task(energon.DefaultTaskEncoder):
    """Return members as bytes, not decoded."""

    decoder = None
    cookers = [energon.Cooker(_to_crude_sample)]


def open_samples(media: BenchmarkMedia, folder: Path, address: str | None) -> Callable[[], Iterator[bytes]]:
    """Return a function that yields the MP4 of every medium, in order, at each call."""
    path: Path | str = media.root / "video"
    if address is not None:
        path = f"msc://far/{media.root.relative_to(media.folder)}/video"
        _configure(address, folder)
    worker = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    settings = {"split_part": "train", "batch_size": None, "task_encoder": _Task()}
    loader = energon.get_loader(energon.get_val_dataset(path, worker_config=worker, **settings))
    return lambda: (sample["mp4"] for sample in loader)


def decode_frames(mp4: bytes, numbers: list[int], out: np.ndarray) -> np.ndarray:
    """Decode uint8 frames (T, H, W, 3) by its AVDecoder: consecutive frames as one clip, others as a clip each."""
    first, last = numbers[0], numbers[-1]
    ranges = [(first, last)] if last - first + 1 == len(numbers) else [(number, number) for number in numbers]
    clips, _ = AVDecoder(io.BytesIO(mp4), suppress_warnings=True).get_video_clips(ranges, video_unit="frames")
    return np.concatenate([clip.permute(0, 2, 3, 1).numpy() for clip in clips])


def _configure(address: str, folder: Path) -> None:
    """Write a profile of its storage client for the bucket at ``address``."""
    endpoint, _, bucket = address.rpartition("/")
    options = {"endpoint_url": endpoint, "base_path": bucket, "region_name": "us-east-1"}
    key = {"type": "S3Credentials", "options": {"access_key": "any", "secret_key": "any"}}
    profile = {"storage_provider": {"type": "s3", "options": options}, "credentials_provider": key}
    (folder / "msc.json").write_text(json.dumps({"profiles": {"far": profile}}))
    os.environ["MSC_CONFIG"] = str(folder / "msc.json")
