"""Media files to the frames that a sampler wants, resized: for building shards and for answering about a video.

    decoded = decode_video("clip.mp4", "decord", 12.4, 27.9, manifest.frames)
    decoded.frames[decoded.sample]      # (n, H, W, 3), what the model sees

A clip is the frames shown within [start, end] seconds. It is sampled as if it were a video of its own, with its own
count of frames and its own duration (end - start). With ``compat="published"`` the frames are those that the published
readers take (:mod:`framestream.pipeline.media.reference_sampling`).

Files that cannot be used raise :class:`MediaError` with a reason. A damaged video is read up to the damage and marked
as salvaged, if it has ``frames.min`` frames (at least a clip) until there; a clip that ends before it is not touched.
Damage counts where the container or the decoder notices it: packets that a Matroska or FLV demuxer passes over in
silence, or changed bytes in a codec without checks, are not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media import reference_sampling as published
from framestream.pipeline.media.errors import REASONS, MediaError
from framestream.pipeline.media.frame_sequences import open_folder, open_gif
from framestream.pipeline.media.image import encode_image, read_image
from framestream.pipeline.media.resize import resize, stored_size
from framestream.pipeline.media.sampling import pad_to_clips, sample_indices
from framestream.pipeline.media.video import InexactSeekError, VideoSource, open_sequential, open_video

__all__ = ["REASONS", "Decoded", "MediaError", "decode_video", "encode_image", "read_image"]

_SLACK = 1e-6  #: seconds by which a frame may miss a clip's edge: times are sums of binary fractions


@dataclass(frozen=True, slots=True)
class Decoded:
    """The sampled frames of one video or clip."""

    frames: np.ndarray  #: uint8 (T, H, W, 3) RGB, distinct frames in time order; the size of ``frames.resize``
    sample: np.ndarray  #: int32 (n,) places in ``frames``, in the sampler's order and with its repeats
    frame_index: np.ndarray  #: int64 (T,) source frame numbers, counted from the clip's first (published: the file's)
    timestamps: np.ndarray  #: float64 (T,) seconds in the source, from the start of the file
    nominal: np.ndarray  #: int64 (N,) frame numbers that the published time message counts; (0,) without ``compat``
    vlen: int  #: source frames of the clip (published: of the file)
    fps: float
    start: float  #: second of the source at which the clip begins
    duration: float  #: seconds of the clip
    source_width: int  #: pixels, upright
    source_height: int
    salvaged: bool  #: the file is damaged: fewer frames could be read than it promises


def decode_video(
    path: str | Path,
    reader: str,
    start: float | None,
    end: float | None,
    frames: FramesConfig,
    seed: int = 0,
    compat: str = "none",
    split: str = "train",
    name: str = "",
) -> Decoded:
    """Decode and resize the frames that ``frames.sampler`` takes of a video, or of its clip [start, end].

    Args:
        path: a video, a GIF, or a folder of frames.
        reader: as annotations name it: ``decord`` and ``av`` for videos (both are read by PyAV, see
            :mod:`framestream.pipeline.media.video`), ``gif``, ``img`` or ``frame`` for folders.
        start: seconds, or None for the beginning.
        end: seconds, or None for the end; a later one than the video's counts as the video's.
        frames: sampler, bounds and size; the sample is padded to whole clips.
        seed: of the ``rand`` sampler.
        compat: ``none``, or ``published`` for the frames of the published readers.
        split: published: clips of ``train`` are read as in training, others as outside of it.
        name: what the annotations call a folder of frames that may lie elsewhere for now: TVQA's are known by it.

    Frames are resized one at a time, as ``frames.resize`` says (:mod:`framestream.pipeline.media.resize`): at most one in full size is
    held, however long the video.

    Raises:
        MediaError: the file is missing, damaged, not a video, or the clip has no frames; published: the reader fails,
            or reads no whole number of clips.
        ValueError: an unknown reader, or bounds that clips of ``frames.clip_frames`` frames do not divide.
    """
    openers = {"decord": open_video, "av": open_video, "gif": open_gif, "img": open_folder, "frame": open_folder}
    if reader not in openers:
        raise ValueError(f"reader {reader!r} is not one of {', '.join(openers)}")
    choose, opener = partial(_choose, path, start, end, frames, seed), openers[reader]
    if compat == "published":
        choose = partial(_choose_published, path, reader, start, end, frames, seed, split)
        opener = partial(open_folder, order=published.file_number) if opener is open_folder else opener
    if openers[reader] is open_folder:
        opener = partial(opener, name=name)
    shrink = _Shrink(path, frames)
    try:
        source = opener(path, shrink)
        choice = choose(source)
        return _take(path, source, choice, _salvaged(path, source, choice, end, frames), shrink)
    except InexactSeekError:
        source = open_sequential(path, shrink, partial(_likely, choose), _least(frames))
        choice = choose(source)
        return _take(path, source, choice, _salvaged(path, source, choice, end, frames), shrink)


class _Shrink:
    """Resizes the pictures of one video, all to the size that follows from the first."""

    def __init__(self, path: str | Path, frames: FramesConfig) -> None:
        self._path, self._frames = path, frames
        self.source = self._stored = (0, 0)

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        if not self._stored[0]:
            self.source = picture.shape[1::-1]
            try:
                self._stored = stored_size(self._frames.resize, self._frames.size, *self.source)
            except ValueError as error:
                raise MediaError("unsupported", self._path, str(error)) from None
        return resize(picture, *self._stored)


@dataclass(frozen=True, slots=True)
class _Choice:
    """Frames of a source; the fields are those of :class:`Decoded`."""

    indices: np.ndarray  #: int64 (n,), counted from ``first``
    first: int  #: number of the clip's first frame in the file
    vlen: int
    fps: float
    start: float
    duration: float
    nominal: np.ndarray


def _choose(
    path: str | Path, start: float | None, end: float | None, frames: FramesConfig, seed: int, source: VideoSource
) -> _Choice:
    first, stop, duration = _clip(path, source, start, end)
    vlen = stop - first
    indices = sample_indices(frames, vlen, source.fps, duration, np.random.default_rng(seed))
    indices = pad_to_clips(indices, vlen, frames.clip_frames)
    return _Choice(indices, first, vlen, source.fps, max(start or 0.0, 0.0), duration, np.empty(0, dtype=np.int64))


def _choose_published(
    path: str | Path,
    reader: str,
    start: float | None,
    end: float | None,
    frames: FramesConfig,
    seed: int,
    split: str,
    source: VideoSource,
) -> _Choice:
    """A clip has both bounds there; with one alone the whole video is read."""
    rng = np.random.default_rng(seed)
    wanted = published.SamplingRequest(frames.sampler, frames.min, frames.max, frames.clip_frames, rng)
    clip = None if start is None or end is None else (start, end)
    try:
        choice = published.select_frames(wanted, reader, source, clip, split)
        choice.check_clips(frames.clip_frames)
    except ValueError as error:
        reason, where = ("too_few_frames", "") if clip is None else ("bad_clip", f" from {start} s to {end} s")
        raise MediaError(reason, path, f"with compat: published,{where} {error}") from None
    begin = 0.0 if clip is None else max(clip[0], 0.0)
    return _Choice(choice.read, 0, len(source.seconds), choice.fps, begin, choice.duration, choice.nominal)


def _likely(choose: Callable[[VideoSource], _Choice], promised: VideoSource) -> list[int]:
    """Numbers of the frames that will be wanted if the file keeps its promise."""
    try:
        choice = choose(promised)
    except MediaError:
        return []
    return (choice.indices + choice.first).tolist()


def _least(frames: FramesConfig) -> int:
    """Frames that must come before the damage of a damaged video."""
    return max(frames.min, frames.clip_frames)


def _salvaged(path: str | Path, source: VideoSource, choice: _Choice, end: float | None, frames: FramesConfig) -> bool:
    """Whether a damaged file's damage concerns the choice; MediaError if too little comes before it."""
    if not source.recovered or (end is not None and end <= source.end):
        return False
    if choice.vlen < (least := _least(frames)):
        text = f"is damaged, and has only {choice.vlen} frames before that; {least} are needed; fetch the file again"
        raise MediaError("too_few_frames", path, text)
    return True


def _take(path: str | Path, source: VideoSource, choice: _Choice, salvaged: bool, shrink: _Shrink) -> Decoded:
    """Decode and resize the frames of a choice."""
    distinct, sample = np.unique(choice.indices, return_inverse=True)
    count, taken = 0, None
    for picture in source.pictures(distinct + choice.first):
        if taken is None:
            taken = np.empty((len(distinct), *picture.shape), dtype=np.uint8)
        taken[count] = picture
        count += 1
    if count < len(distinct):
        raise MediaError("corrupt", path, f"only {count} of {len(distinct)} frames decode the second time")
    return Decoded(
        frames=taken,
        sample=sample.astype(np.int32),
        frame_index=distinct,
        timestamps=source.seconds[distinct + choice.first],
        nominal=choice.nominal,
        vlen=choice.vlen,
        fps=float(choice.fps),
        start=choice.start,
        duration=float(choice.duration),
        source_width=shrink.source[0],
        source_height=shrink.source[1],
        salvaged=salvaged,
    )


def _clip(path: str | Path, source: VideoSource, start: float | None, end: float | None) -> tuple[int, int, float]:
    """The frame numbers [first, stop) of a clip and its duration in seconds."""
    if start is None and end is None:
        return 0, len(source.seconds), len(source.seconds) / source.fps
    low = 0.0 if start is None else max(start, 0.0)
    high = source.end if end is None else min(end, source.end)
    first = int(np.searchsorted(source.seconds, low - _SLACK, "left"))
    stop = int(np.searchsorted(source.seconds, high + _SLACK, "right"))
    if not low < high or first >= stop:  # also for times that are not numbers
        lost = source.recovered and low >= source.end and (end is None or end > low)
        where = f"the file is damaged at {source.end:.2f} s" if lost else f"the video ends at {source.end:.2f} s"
        shown = "the end" if end is None else f"{end} s"
        raise MediaError(
            "truncated" if lost else "bad_clip", path, f"no frames from {start or 0} s to {shown}; {where}"
        )
    return first, stop, round(high - low, 6)
