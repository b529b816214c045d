"""Bring pixels with transparency, or with more than 8 bits, to 8-bit RGB on a black background."""

from __future__ import annotations

import numpy as np
from PIL import Image

_EIGHT_BITS, _TWELVE_BITS = 1 << 8, 1 << 12


def on_black(rgba: np.ndarray) -> np.ndarray:
    """Put RGBA pixels, uint8 (H, W, 4), on black; pixels whose alpha is 0 everywhere count as opaque."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() == 255 or not alpha.any():
        return np.ascontiguousarray(rgb)
    return ((rgb.astype(np.uint16) * alpha + 127) // 255).astype(np.uint8)


def image_to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB on black.

    Gray values of 16 bits keep their upper 8 bits. Values below 4,096 count as 8 to 12 bits, as cameras store them.
    32-bit integers and floats have no range of their own: their smallest value becomes black, and their largest white.

    Raises:
        ValueError: 32-bit values lie almost all at one end of their range.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        image = Image.fromarray(_from_16_bits(values))
    elif image.mode in ("I", "F"):
        image = Image.fromarray(_from_32_bits(np.asarray(image)))
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        if np.asarray(rgba.getchannel("A")).min() < 255:
            background = Image.new("RGBA", rgba.size, "black")
            background.alpha_composite(rgba)
            return background.convert("RGB")
    return image.convert("RGB")


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    peak = int(values.max(initial=0))
    shift = 8 if peak >= _TWELVE_BITS else max(peak.bit_length() - 8, 0)
    return (np.clip(values, 0, None) >> shift).clip(0, _EIGHT_BITS - 1).astype(np.uint8)


def _from_32_bits(values: np.ndarray) -> np.ndarray:
    known = np.isfinite(values)
    if not known.any():
        raise ValueError("none of its values is a finite number")
    low = float(values.min(initial=np.inf, where=known)) if values.dtype.kind == "f" else float(values.min())
    high = float(values.max(initial=-np.inf, where=known)) if values.dtype.kind == "f" else float(values.max())
    if low == high:
        return np.full(values.shape, min(max(low, 0), 255), dtype=np.uint8)
    scaled = np.zeros(values.shape, dtype=np.uint8)
    counts = np.zeros(256, dtype=np.int64)
    for row, (line, seen) in enumerate(zip(values, known, strict=True)):  # line by line: little memory
        scaled[row, seen] = np.rint((line[seen].astype(np.float64) - low) / (high - low) * 255)
        counts += np.bincount(scaled[row, seen], minlength=256)
    if counts.max() > 0.999 * counts.sum() and counts.sum() > 1000:
        raise ValueError(f"its 32-bit values from {low:g} to {high:g} lie almost all at one end; convert it to 8 bits")
    return scaled
