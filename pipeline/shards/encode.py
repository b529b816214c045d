"""Encode one media item for storage in a shard.

A video becomes an MP4 of JPEG frames, an image a JPEG; both come with their columns of the index. Builds of shards and
inference on single files (:mod:`framestream.pipeline.shards.memory_index`) share this code. So a model sees the same
pixels of a file as it would see of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framestream.pipeline.config.preprocessing import ImagesConfig
from framestream.pipeline.media.decode import VideoRequest, decode_video, encode_image
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg
from framestream.pipeline.shards.index import FRAME_DIGEST, NOMINAL
from framestream.pipeline.utils.digests import frame_digest


@dataclass(frozen=True, slots=True)
class EncodedMedia:
    """The stored form of a media item."""

    data: bytes  #: bytes of the MP4 or JPEG
    columns: dict[str, Any]  #: columns of the media table; frame offsets count from the start of ``data``
    damage: str  #: where the file is damaged, if only the frames before that are stored; else empty


def encode_video(path: Path, request: VideoRequest) -> EncodedMedia:
    """Decode the requested frames of a video and encode them as an MP4 of JPEGs, one frame at a time.

    Raises:
        MediaError, ValueError: as :func:`framestream.pipeline.media.decode.decode_video`.
    """
    frames = request.frames
    decoded = decode_video(path, request, lambda frame: encode_jpeg(frame, frames.quality, frames.subsampling))
    jpegs = decoded.encoded
    data = mux_mjpeg(jpegs, decoded.timestamps, decoded.start + decoded.duration, decoded.width, decoded.height)
    offsets, sizes, _ = mjpeg_frames(data)
    columns = {
        "width": decoded.width,
        "height": decoded.height,
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
        FRAME_DIGEST: [frame_digest(jpeg) for jpeg in jpegs],
        NOMINAL.name: decoded.nominal.tolist(),
    }
    return EncodedMedia(data, columns, decoded.damage)


def encode_image_file(path: Path, images: ImagesConfig) -> EncodedMedia:
    """Encode an image as a JPEG.

    Raises:
        MediaError: as :func:`framestream.pipeline.media.image.encode_image`.
    """
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
        FRAME_DIGEST: [frame_digest(data)],
        NOMINAL.name: [],
    }
    return EncodedMedia(data, columns, "")
