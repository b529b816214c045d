"""Select the frames that the published readers select, including their errors, for ``compat: published``.

Each rule is arithmetic on what a reader knows of a file, checked row by row against golden tables. It returns the
frames that are really read, and separately the numbers that the time message counts, because they differ.

* :func:`full_video`: a video without a clip is sampled as in :mod:`framestream.pipeline.media.sampling`.
* :func:`eval_clip`: a clip ends 0.1 s before the video at the latest, and is sampled as a video of its own.
* :func:`train_clip`: the reader of training searches for the frames at full seconds counted from the start of the
  *file*, but starts to search at the start of the *clip*. A late clip gives consecutive frames from its start.
* :func:`folder_frames`: a TVQA folder has 3 frames per second; without a clip it is sampled at 1. Frames of a clip are
  evenly spaced from that of its start to that of its end, both included, never below frame 1.
* :func:`gif_frames`: repeated frames are read once, and counted as often as they were requested.

A rule raises ValueError if its reader fails. The published code then used another sample; here the failure is a row of
the ledger. The published clip reader also fails without a private storage client, which is not reproduced.
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
    """The manifest's sampler and its bounds; ``clip_frames`` is the number of frames per clip of the vision tower."""

    sampler: str
    min_frames: int
    max_frames: int
    clip_frames: int
    rng: np.random.Generator | None = None  #: of the sampler ``rand``

    def indices(self, vlen: int, fps: float) -> np.ndarray:
        """Return the sampler's frame numbers, int64 (N,), of ``vlen`` frames at ``fps``; see :func:`frame_indices`."""
        return frame_indices(
            self.sampler, vlen, fps, vlen / fps, self.min_frames, self.max_frames, self.clip_frames, self.rng
        )

    def count(self, duration: float, frames: float) -> int:
        """Return how many frames are spread evenly over a clip: the maximum, except for ``dynamic_fps1``."""
        if self.sampler != "dynamic_fps1":
            return self.max_frames
        return fps1_count(duration, frames, self.min_frames, self.max_frames, self.clip_frames)


@dataclass(frozen=True, slots=True)
class FrameSelection:
    """The frames that a published reader selects of a video or clip."""

    indices: np.ndarray  #: int64 (R,) numbers of the file's frames that are read, in the order in which they are shown
    nominal: np.ndarray  #: int64 (N,) the numbers that the time message counts; N need not be R
    fps: float  #: frames per second by which the long message converts ``nominal`` to seconds
    duration: float  #: seconds, as the message states them

    def check_clips(self, clip_frames: int) -> None:
        """Raise ValueError if there are no frames, or their number is not a multiple of ``clip_frames``."""
        if not len(self.indices) or len(self.indices) % clip_frames:
            raise ValueError(f"{len(self.indices)} frames are read, which is not a multiple of {clip_frames}")


def select_frames(
    request: SamplingRequest, reader: str, source: VideoSource, clip: Clip | None, split: str
) -> FrameSelection:
    """Select the frames that ``reader`` reads of an opened file; clips of split ``train`` are read as in training."""
    count, fps = len(source.seconds), source.fps
    if reader in ("img", "frame"):
        return folder_frames(request, count, fps, clip)
    if reader == "gif":
        return gif_frames(request, count, clip)
    if clip is None:
        return full_video(request, count, fps)
    if split != "train":
        return eval_clip(request, count, fps, clip)
    if source.frame_times is None:
        raise ValueError("the frames have no times or no rate")
    return train_clip(request, source.frame_times, clip)


def full_video(request: SamplingRequest, vlen: int, fps: float) -> FrameSelection:
    """Select frames of a video of ``vlen`` frames without a clip."""
    indices = request.indices(vlen, fps)
    return FrameSelection(indices, indices, fps, vlen / fps)


def eval_clip(request: SamplingRequest, vlen: int, fps: float, clip: Clip) -> FrameSelection:
    """Select frames of a clip of a video of ``vlen`` frames, as in evaluation."""
    start, end = max(0, clip[0]), min(vlen / fps - 0.1, clip[1])
    indices = request.indices(int((end - start) * fps), fps) + int(start * fps)
    return FrameSelection(indices, indices, fps, end - start)


def train_clip(request: SamplingRequest, times: FrameTimes, clip: Clip) -> FrameSelection:
    """Select frames of a clip of a video whose frames are shown at ``times``, as in training."""
    (start, end), ticks, rate = clip, times.ticks, times.rate
    nominal = spread_evenly(int(end - start) * rate, request.count(end - start, end - start))
    number, indices = int(np.searchsorted(ticks, int(start / float(times.base)))), []
    for index in nominal.tolist():
        target = math.ceil(int(index / rate) / times.base)  # full seconds from the start of the file
        number = max(number, int(np.searchsorted(ticks, target)))
        if number >= len(ticks):
            break
        indices.append(number)
        number += 1
    if not indices:
        raise ValueError(f"no frame found for {len(nominal)} requested times")
    return FrameSelection(np.array(indices, dtype=np.int64), nominal, float(rate), end - start)


def spread_evenly(frames: Fraction | int, count: int) -> np.ndarray:
    """Return ``count`` evenly spaced numbers, int64, over ``frames`` frames; they include -1 if there are no frames."""
    if count < 1:
        raise ValueError(f"{count} frames are requested")
    step = float(frames - 1) / count
    return int(step / 2) + np.round(step * np.arange(count)).astype(np.int64)


def folder_frames(request: SamplingRequest, files: int, fps: float, clip: Clip | None) -> FrameSelection:
    """Select frames of a folder of ``files`` frames at ``fps``, in the order of :func:`file_number`."""
    if clip is None:
        indices = request.indices(files, 1.0)
        return FrameSelection(indices, indices, fps, files / fps)
    vlen = (min(files / fps, clip[1]) - max(0, clip[0])) * fps
    duration = vlen / fps
    first, last = max(1, round(clip[0] * fps)), min(round(clip[1] * fps), files - 1)
    gaps = request.count(duration, vlen) - 1
    if not gaps:
        raise ValueError("one frame is requested, but a clip of a folder requires two")
    indices = first + np.round((last - first) / gaps * np.arange(gaps + 1)).astype(np.int64)  # empty for negative gaps
    try:
        read = np.arange(files)[indices]  # negative numbers count from the end
    except IndexError:
        raise ValueError(f"frame {indices.max()} is requested, but the folder has {files}") from None
    return FrameSelection(read, indices, fps, duration)


def file_number(name: str) -> int:
    """Return the number after the last underscore of a name, by which a folder is sorted; -1 without one."""
    match = _NUMBERED.search(name)
    return int(match[1]) if match else -1


def gif_frames(request: SamplingRequest, frames: int, clip: Clip | None) -> FrameSelection:
    """Select frames of a GIF of ``frames`` frames, at 1 frame per second; clips of it fail."""
    if clip is not None:
        raise ValueError("clips of a GIF are not supported")
    indices = request.indices(frames, 1.0)
    return FrameSelection(np.unique(indices), indices, 1.0, float(frames))
