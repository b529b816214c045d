"""webdataset: the unchanged shards, streamed from beginning to end, remote ones by curl."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import webdataset

from benchmarks.loading.media import BenchmarkMedia


def open_samples(media: BenchmarkMedia, folder: Path, address: str | None) -> Callable[[], Iterator[bytes]]:
    """Return a function that yields the MP4 of every medium, in order, at each call."""
    names = sorted(path.name for path in (media.root / "video").glob("*.tar"))
    base = media.root if address is None else f"{address}/{media.root.relative_to(media.folder)}"
    data = webdataset.WebDataset([f"{base}/video/{name}" for name in names], shardshuffle=False, empty_check=False)
    return lambda: (sample["mp4"] for sample in data)
