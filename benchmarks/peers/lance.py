"""Lance: the media as blobs of its own files, opened as lazy file objects; remote ones by its object store as S3."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import lance
import numpy as np
import pyarrow as pa

from benchmarks.loading.media import BenchmarkMedia

RANDOM_ACCESS = True
SCHEMA = pa.schema([pa.field("key", pa.string()), lance.blob_field("mp4")])
BUFFER = 1 << 15  #: bytes that a blob reads ahead; its default of 512 KiB moves eight times as much here


def write_samples(media: BenchmarkMedia, folder: Path) -> None:
    """Write the media as a blob column."""

    def batches() -> Iterator[pa.RecordBatch]:
        for key, mp4 in media.samples():
            yield pa.record_batch([pa.array([key]), lance.blob_array([mp4])], schema=SCHEMA)

    reader = pa.RecordBatchReader.from_batches(SCHEMA, batches())
    lance.write_dataset(reader, str(folder / "blobs"), data_storage_version="2.2")


def open_samples(
    media: BenchmarkMedia, folder: Path, address: str | None, lazily: bool = True
) -> Callable[[], Iterator[lance.BlobFile]]:
    """Return a function that yields an open blob for every medium, in order, at each call."""
    uri, options = str(folder / "blobs"), None
    if address is not None:
        endpoint, _, bucket = address.rpartition("/")
        uri = f"s3://{bucket}/{folder.relative_to(media.folder)}/blobs"
        options = {"aws_endpoint": endpoint, "aws_region": "us-east-1", "allow_http": "true"}
        options |= {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
    data = lance.dataset(uri, storage_options=options)
    return lambda: iter(data.take_blobs("mp4", indices=list(range(media.count)), buffer_size=BUFFER))


def decode_frames(blob: lance.BlobFile, numbers: list[int], out: np.ndarray) -> np.ndarray:
    """Decode with PyAV from the lazy file, as Lance's guide does: seek, then decode."""
    with av.open(blob) as container:
        stream = container.streams.video[0]
        entries, frames, following = stream.index_entries, _decoded(container), -1
        for number, frame in zip(numbers, out, strict=True):
            if number != following:
                container.seek(entries[number].timestamp, stream=stream)
                frames = _decoded(container)
            frame[:] = next(frames).to_ndarray(format="rgb24")
            following = number + 1
    return out


def _decoded(container: Any) -> Iterator[av.VideoFrame]:
    return container.decode(video=0)
