"""Which stored frames are shown: those nearest to what a sampler takes of the source."""

from __future__ import annotations

import numpy as np

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media.resize import stored_size
from framestream.pipeline.media.sampling import frame_indices, pad_to_clips, sample_indices
from framestream.pipeline.shards.media_view import nearest_indices

#: So many frames; or a manifest's ``frames``, its size included; or None: each stored frame once.
FrameChoice = int | FramesConfig | None


def validate_choice(choice: FrameChoice) -> None:
    """Refuse what is no number of frames (ValueError)."""
    if not (choice is None or isinstance(choice, FramesConfig) or (type(choice) is int and choice > 0)):
        raise ValueError(f"frames: {choice!r} is no number of frames; give one of at least 1, Frames(...) or None")


def choose_stored_frames(
    choice: FrameChoice, stored: np.ndarray, vlen: int, fps: float, duration: float, seed: int
) -> np.ndarray:
    """Places in ``stored``, int64 (T,), ascending, with repeats where fewer frames are stored than wanted.

    A number N takes the middles of N equal parts of the video, as the sampler ``middle``; ``Frames`` goes by its own
    rules, and its counts are whole clips. Between the first and the last stored frame, what is shown is off by at most
    half the gap there.

    Args:
        stored: int64 (n,), numbers of the stored frames in the source, ascending from the clip's first.
        vlen: frames of the source's clip.
        fps: source frames a second.
        duration: seconds of the clip.
        seed: of the sampler ``rand``.
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
    """(width, height) of what is shown of frames stored at ``width`` x ``height``: as stored, or as ``Frames`` says.

    Raises:
        ValueError: the frames are too narrow to keep their proportions at that size.
    """
    return (
        stored_size(choice.resize, choice.size, width, height) if isinstance(choice, FramesConfig) else (width, height)
    )
