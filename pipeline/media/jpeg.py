"""Encode and decode JPEG frames with libjpeg-turbo."""

from __future__ import annotations

import numpy as np
import simplejpeg


def encode_jpeg(frame: np.ndarray, quality: int, subsampling: str) -> bytes:
    """Encode an RGB frame (H, W, 3) uint8, with the fast DCT below quality 96; ``subsampling`` is 420, 422 or 444."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality, "RGB", subsampling)


def decode_jpeg(data: bytes | memoryview, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG to RGB pixels (H, W, 3) uint8, into ``out`` (C-contiguous, of that shape) if given.

    Raises:
        ValueError: the bytes are not one complete JPEG, or its size is not that of ``out``.
    """
    if out is None:
        return simplejpeg.decode_jpeg(data, "RGB")
    try:
        if simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape == out.shape:
            return out
    except ValueError:  # not a JPEG, or a larger one
        if jpeg_size(data) == out.shape[1::-1]:
            raise
    width, height = jpeg_size(data)
    raise ValueError(f"a JPEG of {width} x {height} does not fit an array of shape {out.shape}")


def jpeg_size(data: bytes | memoryview) -> tuple[int, int]:
    """Read width and height in pixels from the header of a JPEG.

    Raises:
        ValueError: there is no JPEG header.
    """
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return width, height
