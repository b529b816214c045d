"""Select which stored frames are returned: those nearest to the frames that a sampler selects of the source."""

from __future__ import annotations

import numpy as np

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.resize import stored_size
from framestream.pipeline.media.sampling import frame_indices, pad_to_clips, sample_indices
from framestream.pipeline.shards.media_view import nearest_indices

#: A number of frames, or a manifest's ``frames`` (also its size), or None for each stored frame once.
FrameChoice = int | FramesConfig | None


def validate_choice(choice: FrameChoice) -> None:
    """Check the type and the number.

    Raises:
        ValueError: not a number of frames, a :class:`FramesConfig` or None.
    """
    if not (choice is None or isinstance(choice, FramesConfig) or (type(choice) is int and choice > 0)):
        raise ValueError(
            f"frames: {choice!r} is not a number of frames; pass an integer of at least 1, FramesConfig(...) or None"
        )


def choose_stored_frames(
    choice: FrameChoice, stored: np.ndarray, vlen: int, fps: float, duration: float, seed: int
) -> np.ndarray:
    """Return which stored frames to use, with repeats if fewer frames are stored than requested.

    A number N selects the middles of N equal parts of the video, as the sampler ``middle`` does. A
    :class:`FramesConfig` selects by its own rules, and its number of frames is a multiple of ``clip_frames``. Between
    the first and the last stored frame, a frame is off by at most half the gap between stored frames.

    Args:
        choice: number of frames, settings of a sampler, or None.
        stored: int64 (n,), source frame numbers of the stored frames, ascending, counted from the clip's first.
        vlen: number of source frames of the clip.
        fps: source frames a second.
        duration: seconds of the clip.
        seed: of the sampler ``rand``.

    Returns:
        int64 (T,), indices into ``stored``, ascending.
    """
    if choice is None:
        return np.arange(len(stored))
    if isinstance(choice, FramesConfig):
        rng = np.random.default_rng(seed) if choice.sampler == "rand" else None
        wanted = pad_to_clips(sample_indices(choice, vlen, fps, duration, rng), vlen, choice.clip_frames)
    else:
        wanted = frame_indices("middle", vlen, fps, duration, choice, choice, 1)
    return nearest_indices(stored, wanted)


def shown_size(choice: FrameChoice, width: int, height: int) -> tuple[int, int]:
    """Return (width, height) of the frames that are returned, in pixels.

    Args:
        choice: a :class:`FramesConfig` decides the size; otherwise it is the stored one.
        width: of the stored frames, in pixels.
        height: of the stored frames, in pixels.

    Raises:
        ValueError: the frames are too narrow to keep their aspect ratio at that size.
    """
    if not isinstance(choice, FramesConfig):
        return width, height
    return stored_size(choice.resize, choice.size, width, height)
