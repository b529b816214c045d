"""A contact sheet: the pictures that a model is shown, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from framestream.pipeline.media.resize import resize

IMAGE_SIDE, IMAGES_PER_LINE, CAPTION_HEIGHT = 160, 8, 14  #: pixels of a picture's side, pictures in a line, pixels for the words below


def write_contact_sheet(path: str | Path, pictures: Sequence[np.ndarray], words: Sequence[str]) -> None:
    """Write ``pictures``, uint8 (S, S, 3) each, with a word below each, as a JPEG or what the suffix says.

    Raises:
        OSError, ValueError: the file cannot be written, or its suffix is unknown.
    """
    across = min(IMAGES_PER_LINE, len(pictures))
    sheet = Image.new("RGB", (across * IMAGE_SIDE, math.ceil(len(pictures) / across) * (IMAGE_SIDE + CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, word) in enumerate(zip(pictures, words, strict=True)):
        left, top = number % across * IMAGE_SIDE, number // across * (IMAGE_SIDE + CAPTION_HEIGHT)
        sheet.paste(Image.fromarray(resize(picture, IMAGE_SIDE, IMAGE_SIDE)), (left, top))
        draw.text((left + 2, top + IMAGE_SIDE), word, fill="black")
    sheet.save(path)
