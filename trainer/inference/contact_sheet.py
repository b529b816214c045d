"""Draw a contact sheet: the images that a model sees, in one file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from framestream.pipeline.media.resize import resize

IMAGE_SIDE = 160  #: pixels of an image's side
IMAGES_PER_LINE = 8
CAPTION_HEIGHT = 14  #: pixels below an image


def write_contact_sheet(path: str | Path, images: Sequence[np.ndarray], captions: Sequence[str]) -> None:
    """Write ``images`` with a caption below each; the format follows the suffix of ``path``.

    Args:
        path: file to write, such as ``sheet.jpg``.
        images: uint8 (S, S, 3) each.
        captions: one for each image.

    Raises:
        OSError, ValueError: the file cannot be written, or its suffix is unknown.
    """
    columns = min(IMAGES_PER_LINE, len(images))
    lines = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * IMAGE_SIDE, lines * (IMAGE_SIDE + CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = number % columns * IMAGE_SIDE, number // columns * (IMAGE_SIDE + CAPTION_HEIGHT)
        sheet.paste(Image.fromarray(resize(image, IMAGE_SIDE, IMAGE_SIDE)), (left, top))
        draw.text((left + 2, top + IMAGE_SIDE), caption, fill="black")
    sheet.save(path)
