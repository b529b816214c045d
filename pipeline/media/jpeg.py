"""TODO."""

from __future__ import annotations

import numpy as np
import simplejpeg


def encode_jpeg(frame: np.ndarray, quality: int, subsampling: str) -> bytes:
    """JPEG of an RGB frame (H, W, 3) uint8; ``subsampling`` is 420, 422 or 444. libjpeg-turbo, accurate DCT."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality, "RGB", subsampling)


def decode_jpeg(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a JPEG, decoded into ``out`` (C-contiguous, of that shape) where given.

    Raises:
        ValueError: the bytes are not one whole JPEG, or its size is not that of ``out``.
    """
    if out is None:
        return simplejpeg.decode_jpeg(data, "RGB")
    try:
        if simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape == out.shape:
            return out
    except ValueError:  # no JPEG, or a larger one
        if jpeg_size(data) == out.shape[1::-1]:
            raise
    width, height = jpeg_size(data)
    raise ValueError(f"a JPEG of {width} x {height} does not fit an array of shape {out.shape}")


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Width and height in pixels, from the header of a JPEG.

    Raises:
        ValueError: no JPEG header.
    """
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return width, height
