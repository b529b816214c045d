"""LitData: the media in its own chunks, remote ones read by its S3 client."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import litdata
from litdata.streaming import downloader
from litdata.streaming.writer import BinaryWriter

from benchmarks.loading.media import BenchmarkMedia


def write_samples(media: BenchmarkMedia, folder: Path) -> None:
    """Write the media in its format, in chunks of at most 64 MB."""
    writer = BinaryWriter(str(folder / "chunks"), chunk_bytes=1 << 26)
    for number, (key, mp4) in enumerate(media.samples()):
        writer[number] = {"key": key, "mp4": mp4}
    writer.done()
    writer.merge()


def open_samples(media: BenchmarkMedia, folder: Path, address: str | None) -> Callable[[], Iterator[bytes]]:
    """Return a function that yields the MP4 of every medium, in order, at each call."""
    settings = {"input_dir": str(folder / "chunks")}
    if address is not None:
        endpoint, _, bucket = address.rpartition("/")
        os.environ |= {"AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1"}
        downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it has no setting for this
        remote = f"s3://{bucket}/{folder.relative_to(media.folder)}/chunks"
        options = {"endpoint_url": endpoint}
        settings = {"input_dir": remote, "cache_dir": tempfile.mkdtemp(), "storage_options": options}
    data = litdata.StreamingDataset(**settings, shuffle=False, max_pre_download=8)
    return lambda: (sample["mp4"] for sample in data)
