"""A contact sheet: the pictures that a model is shown, as one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from framestream.pipeline.media.resize import resize

SIDE, ACROSS, MARGIN = 160, 8, 14  #: pixels of a picture's side, pictures in a line, pixels for the words below


def write_contact_sheet(path: str | Path, pictures: Sequence[np.ndarray], words: Sequence[str]) -> None:
    """Write ``pictures``, uint8 (S, S, 3) each, with a word below each, as a JPEG or what the suffix says.

    Raises:
        OSError, ValueError: the file cannot be written, or its suffix is unknown.
    """
    across = min(ACROSS, len(pictures))
    sheet = Image.new("RGB", (across * SIDE, math.ceil(len(pictures) / across) * (SIDE + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, word) in enumerate(zip(pictures, words, strict=True)):
        left, top = number % across * SIDE, number // across * (SIDE + MARGIN)
        sheet.paste(Image.fromarray(resize(picture, SIDE, SIDE)), (left, top))
        draw.text((left + 2, top + SIDE), word, fill="black")
    sheet.save(path)
