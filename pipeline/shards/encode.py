"""One media item to what is stored of it: an MP4 of JPEG frames or a JPEG, and its columns of the index.

Shards are built of these bytes, and a file that is asked about (:mod:`framestream.pipeline.shards.memory_index`) goes the same way, so that a
model sees of it what it would see of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig
from framestream.pipeline.media.decode import decode_video, encode_image
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg
from framestream.pipeline.shards.index import NOMINAL


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """What is stored of a media item."""

    data: bytes  #: of an MP4 or a JPEG
    columns: dict[str, Any]  #: of the media table, with frame offsets from the start of ``data``
    salvaged: bool  #: the file is damaged: fewer frames could be read than it promises


def encode_video(
    path: Path,
    reader: str,
    start: float | None,
    end: float | None,
    frames: FramesConfig,
    seed: int = 0,
    compat: str = "none",
    split: str = "train",
    name: str = "",
) -> EncodedMedia:
    """The frames that ``frames.sampler`` takes of a video; arguments and errors of
    :func:`framestream.pipeline.media.decode.decode_video`."""
    decoded = decode_video(path, reader, start, end, frames, seed, compat, split=split, name=name)
    jpegs = [encode_jpeg(frame, frames.quality, frames.subsampling) for frame in decoded.frames]
    height, width = decoded.frames.shape[1:3]
    data = mux_mjpeg(jpegs, decoded.timestamps, decoded.start + decoded.duration, width, height)
    offsets, sizes, _ = mjpeg_frames(data)
    columns = {
        "width": width,
        "height": height,
        "source_width": decoded.source_width,
        "source_height": decoded.source_height,
        "vlen": decoded.vlen,
        "fps": decoded.fps,
        "duration": decoded.duration,
        "start": decoded.start,
        "sample": decoded.sample.tolist(),
        "frame_index": decoded.frame_index.tolist(),
        "timestamps": decoded.timestamps.tolist(),
        "frame_offset": offsets.tolist(),
        "frame_size": sizes.tolist(),
        NOMINAL.name: decoded.nominal.tolist(),
    }
    return EncodedMedia(data, columns, decoded.salvaged)


def encode_image_file(path: Path, images: ImagesConfig) -> EncodedMedia:
    """A picture; errors of :func:`framestream.pipeline.media.decode.encode_still`."""
    data, width, height, source_width, source_height = encode_image(path, images)
    columns = {
        "width": width,
        "height": height,
        "source_width": source_width,
        "source_height": source_height,
        "vlen": 1,
        "fps": 0.0,
        "duration": 0.0,
        "start": 0.0,
        "sample": [0],
        "frame_index": [0],
        "timestamps": [0.0],
        "frame_offset": [0],
        "frame_size": [len(data)],
        NOMINAL.name: [],
    }
    return EncodedMedia(data, columns, False)
