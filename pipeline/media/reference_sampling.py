"""The frames that the published readers take, faults included: what ``compat: published`` brings back.

Each rule is arithmetic on what a reader knows of a file, checked row by row against golden tables. It gives the frames
that are really read, and apart from them the numbers that the time message counts, because the two differ:

* :func:`whole`: a video without a clip is sampled as here (:mod:`framestream.pipeline.media.sampling`).
* :func:`clip_evaluated`: a clip is cut to end 0.1 s before the video does and sampled as a video of its own.
* :func:`clip_trained`: the reader of training looks for the frames of whole seconds counted from the start of the
  *file*, but begins to look at the start of the *clip*: a late clip gives consecutive frames from its start.
* :func:`folder`: a TVQA folder has 3 frames a second; without a clip it is sampled at 1. A clip runs evenly from the
  frame of its start to that of its end, both included, never below frame 1.
* :func:`gif`: repeated frames are read once and counted as often as they were asked for.

A rule raises ValueError where its reader fails. There every failure showed a neighbour of the sample; here it is a row
of the ledger. The published clip reader also fails without a private storage client, which is not brought back.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from framestream.pipeline.media.sampling import fps1_count, frame_indices
from framestream.pipeline.media.video import FrameTimes, VideoSource

Clip = tuple[float, float]  #: start and end in seconds

_NUMBERED = re.compile(r"_(\d+)\.(?:jpg|jpeg|png)$")


@dataclass(frozen=True, slots=True)
class SamplingRequest:
    """The manifest's sampler and its bounds, in frames; ``local`` is the number of frames of a clip of the tower."""

    sampler: str
    min_frames: int
    max_frames: int
    clip_frames: int
    rng: np.random.Generator | None = None  #: of the sampler ``rand``

    def indices(self, vlen: int, fps: float) -> np.ndarray:
        """The sampler's frame numbers, int64 (N,), of ``vlen`` frames at ``fps``; see :func:`frame_indices`."""
        return frame_indices(
            self.sampler, vlen, fps, vlen / fps, self.min_frames, self.max_frames, self.clip_frames, self.rng
        )

    def count(self, duration: float, frames: float) -> int:
        """How many frames are spread evenly over a clip; every sampler but ``dynamic_fps1`` asks for all it may."""
        if self.sampler != "dynamic_fps1":
            return self.max_frames
        return fps1_count(duration, frames, self.min_frames, self.max_frames, self.clip_frames)


@dataclass(frozen=True, slots=True)
class FrameSelection:
    """What a published reader gives of a video or clip."""

    indices: np.ndarray  #: int64 (R,) numbers of the file's frames that are read, in the order shown
    nominal: np.ndarray  #: int64 (N,) the numbers that the time message counts; N need not be R
    fps: float  #: frames a second by which the long message makes seconds of ``nominal``
    duration: float  #: seconds, as the message tells them

    def check_clips(self, local: int) -> None:
        """Refuse a number of frames that whole clips of ``local`` frames do not make up, or none (ValueError)."""
        if not len(self.indices) or len(self.indices) % local:
            raise ValueError(f"{len(self.indices)} frames are read, which is no whole number of clips of {local}")


def select_frames(
    wanted: SamplingRequest, reader: str, source: VideoSource, clip: Clip | None, split: str
) -> FrameSelection:
    """What ``reader`` takes of an opened file; clips of split ``train`` are read as in training."""
    count, fps = len(source.seconds), source.fps
    if reader in ("img", "frame"):
        return folder_frames(wanted, count, fps, clip)
    if reader == "gif":
        return gif_frames(wanted, count, clip)
    if clip is None:
        return full_video(wanted, count, fps)
    if split != "train":
        return eval_clip(wanted, count, fps, clip)
    if source.frame_times is None:
        raise ValueError("the frames have no times or no rate")
    return train_clip(wanted, source.frame_times, clip)


def full_video(wanted: SamplingRequest, vlen: int, fps: float) -> FrameSelection:
    """A video of ``vlen`` frames without a clip."""
    indices = wanted.indices(vlen, fps)
    return FrameSelection(indices, indices, fps, vlen / fps)


def eval_clip(wanted: SamplingRequest, vlen: int, fps: float, clip: Clip) -> FrameSelection:
    """A clip of a video of ``vlen`` frames, as outside of training."""
    start, end = max(0, clip[0]), min(vlen / fps - 0.1, clip[1])
    indices = wanted.indices(int((end - start) * fps), fps) + int(start * fps)
    return FrameSelection(indices, indices, fps, end - start)


def train_clip(wanted: SamplingRequest, clock: FrameTimes, clip: Clip) -> FrameSelection:
    """A clip of a video whose frames are shown at the times of ``clock``, as in training."""
    (start, end), ticks, rate = clip, clock.ticks, clock.rate
    nominal = spread_evenly(int(end - start) * rate, wanted.count(end - start, end - start))
    place, read = int(np.searchsorted(ticks, int(start / float(clock.base)))), []
    for index in nominal.tolist():
        target = math.ceil(int(index / rate) / clock.base)  # whole seconds from the start of the file
        place = max(place, int(np.searchsorted(ticks, target)))
        if place >= len(ticks):
            break
        read.append(place)
        place += 1
    if not read:
        raise ValueError(f"no frame lies where {len(nominal)} are looked for")
    return FrameSelection(np.array(read, dtype=np.int64), nominal, float(rate), end - start)


def spread_evenly(frames: Fraction | int, count: int) -> np.ndarray:
    """``count`` numbers, int64, over ``frames`` frames at even distances; -1 stands among them for no frames."""
    if count < 1:
        raise ValueError(f"{count} frames are asked for")
    step = float(frames - 1) / count
    return int(step / 2) + np.round(step * np.arange(count)).astype(np.int64)


def folder_frames(wanted: SamplingRequest, files: int, fps: float, clip: Clip | None) -> FrameSelection:
    """A folder of ``files`` frames at ``fps``, in the order of :func:`file_number`."""
    if clip is None:
        indices = wanted.indices(files, 1.0)
        return FrameSelection(indices, indices, fps, files / fps)
    vlen = (min(files / fps, clip[1]) - max(0, clip[0])) * fps
    duration = vlen / fps
    first, last = max(1, round(clip[0] * fps)), min(round(clip[1] * fps), files - 1)
    gaps = wanted.count(duration, vlen) - 1
    if not gaps:
        raise ValueError("one frame is asked for, a clip of a folder needs two")
    indices = first + np.round((last - first) / gaps * np.arange(gaps + 1)).astype(np.int64)  # none below 0 frames
    try:
        read = np.arange(files)[indices]  # a number below 0 counts from the end
    except IndexError:
        raise ValueError(f"frame {indices.max()} is asked for, the folder has {files}") from None
    return FrameSelection(read, indices, fps, duration)


def file_number(name: str) -> int:
    """What orders the files of a folder: the number after the last underscore, -1 where there is none."""
    match = _NUMBERED.search(name)
    return int(match[1]) if match else -1


def gif_frames(wanted: SamplingRequest, frames: int, clip: Clip | None) -> FrameSelection:
    """A GIF of ``frames`` frames, at 1 frame a second; clips of it fail."""
    if clip is not None:
        raise ValueError("a GIF has no clips")
    indices = wanted.indices(frames, 1.0)
    return FrameSelection(np.unique(indices), indices, 1.0, float(frames))
