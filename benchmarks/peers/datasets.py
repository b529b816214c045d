"""Hugging Face datasets: a column of MP4 files with its video feature, which torchcodec decodes; remote ones by HTTP.

torchcodec looks for FFmpeg's libraries by their plain names. ``make bench`` links those of PyAV's wheel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.utils.file_utils import xopen

from benchmarks.loading.media import BenchmarkMedia

RANDOM_ACCESS = True


def write_samples(media: BenchmarkMedia, folder: Path) -> None:
    """Write the media as files."""
    for number, (_, mp4) in enumerate(media.samples()):
        (folder / f"{number:06d}.mp4").write_bytes(mp4)


def open_samples(media: BenchmarkMedia, folder: Path, address: str | None, lazily: bool) -> Callable[[], Iterator[Any]]:
    """Return a function that yields a decoder or an open file for every medium, in order, at each call."""
    base = folder if address is None else f"{address}/{folder.relative_to(media.folder)}"
    column = {"video": [f"{base}/{number:06d}.mp4" for number in range(media.count)]}
    feature = datasets.Video(decode=not lazily, dimension_order="NHWC", seek_mode="approximate")
    data = datasets.Dataset.from_dict(column).cast_column("video", feature)
    if not lazily:
        return lambda: (row["video"] for row in data)
    return lambda: (_open(row["video"]["path"]) for row in data)


def decode_frames(decoder: Any, numbers: list[int], out: np.ndarray) -> np.ndarray:
    """Decode uint8 frames (T, H, W, 3) by torchcodec."""
    return decoder.get_frames_at(numbers).data.numpy()


def _open(path: str) -> Any:
    """Open a file; for a remote one, in the least blocks that its file system reads at once."""
    return xopen(path, "rb", block_size=1 << 16) if "://" in path else open(path, "rb")
