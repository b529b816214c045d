"""Frames to the size at which they are stored or shown."""

from __future__ import annotations

import numpy as np
from PIL import Image

MAX_ASPECT = 16  #: a longer side over so many times ``size`` is not stored
SMALL = 1 << 15  #: pixels up to which Pillow is as good: loading PyTorch takes longer than hundreds of such pictures


def stored_size(mode: str, size: int, width: int, height: int) -> tuple[int, int]:
    """(width, height) at which a picture of ``width`` x ``height`` pixels is stored under ``frames.resize``.

    ``stretch``: size x size. ``short_side`` and ``long_side``: that side is ``size`` and the other one keeps the
    proportions, rounded to an even number of at least 2. Pixels count as square.

    Raises:
        ValueError: the longer side would be over ``MAX_ASPECT`` times ``size``.
    """
    if mode == "stretch":
        return size, size
    scale = size / (min if mode == "short_side" else max)(width, height)
    new = tuple(max(2, 2 * round(side * scale / 2)) for side in (width, height))
    if max(new) > MAX_ASPECT * size:
        raise ValueError(f"{width} x {height} pixels are too narrow to keep their proportions (frames.resize: {mode})")
    return new


def resize(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), at ``width`` x ``height`` by the bicubic filter (a = -0.5) widened when reducing.

    Small pictures are resized by Pillow (``Resampling.BICUBIC``), others by PyTorch's kernel, which has Pillow's
    integer arithmetic with coarser weights: 99.9 % of the values of real footage are Pillow's, the rest one level off,
    in an eighth of the time (720p to 224 pixels: 0.95 against 7.5 ms). The result does not depend on the processor's
    vector instructions.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    if pixels.shape[0] * pixels.shape[1] <= SMALL:
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    if height < pixels.shape[0] and width > pixels.shape[1]:
        pixels = resize(pixels, pixels.shape[1], height)  # a side that shrinks goes before one that grows, as in Pillow
    import torch  # here, because it takes over a second

    planes = torch.from_numpy(np.require(pixels, requirements=("C", "W"))).permute(2, 0, 1)[None]
    small = torch.nn.functional.interpolate(planes, size=(height, width), mode="bicubic", antialias=True)
    return small[0].permute(1, 2, 0).numpy()
