"""MosaicML Streaming: the media in MDS shards, remote ones read by its S3 client."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import streaming

from benchmarks.loading.media import BenchmarkMedia

COLUMNS = {"key": "str", "mp4": "bytes"}


def write_samples(media: BenchmarkMedia, folder: Path) -> None:
    """Write the media in its format, in shards of at most 64 MB."""
    with streaming.MDSWriter(out=str(folder / "mds"), columns=COLUMNS, size_limit=1 << 26) as writer:
        for key, mp4 in media.samples():
            writer.write({"key": key, "mp4": mp4})


def open_samples(media: BenchmarkMedia, folder: Path, address: str | None) -> Callable[[], Iterator[bytes]]:
    """Return a function that yields the MP4 of every medium, in order, at each call."""
    settings = {"local": str(folder / "mds")}
    if address is not None:
        endpoint, _, bucket = address.rpartition("/")
        os.environ |= {"S3_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
        remote = f"s3://{bucket}/{folder.relative_to(media.folder)}/mds"
        settings = {"remote": remote, "local": tempfile.mkdtemp()}
    data = streaming.StreamingDataset(**settings, shuffle=False, batch_size=1, predownload=media.count)
    return lambda: (sample["mp4"] for sample in data)
