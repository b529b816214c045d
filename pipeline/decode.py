"""Media files to the frames that a sampler wants, resized: for building shards and for answering about a video.

    decoded = decode_video("clip.mp4", "decord", 12.4, 27.9, manifest.frames)
    decoded.frames[decoded.sample]      # (n, S, S, 3), what the model sees

A clip is the frames shown within [start, end] seconds. It is sampled as if it were a video of its own, with its own
count of frames and its own duration (end - start). Broken files raise :class:`MediaError` with a reason. With
``compat="published"`` the frames are those that the published readers take (:mod:`pipeline.published`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline import published
from pipeline.manifest import Frames
from pipeline.media import REASONS, MediaError
from pipeline.sampling import fit_to_clips, sample_indices
from pipeline.sources import InexactError, Source, open_folder, open_gif, open_straight, open_video
from pipeline.stills import encode_still, read_image

__all__ = ["REASONS", "Decoded", "MediaError", "decode_video", "encode_still", "read_image"]

_SLACK = 1e-6  #: seconds by which a frame may miss a clip's edge: times are sums of binary fractions


@dataclass(frozen=True, slots=True)
class Decoded:
    """The sampled frames of one video or clip."""

    frames: np.ndarray  #: uint8 (T, S, S, 3) RGB, distinct frames in time order
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
    frames: Frames,
    seed: int = 0,
    compat: str = "none",
    split: str = "train",
    name: str = "",
) -> Decoded:
    """Decode and resize the frames that ``frames.sampler`` takes of a video, or of its clip [start, end].

    Args:
        path: a video, a GIF, or a folder of frames.
        reader: as annotations name it: ``decord`` and ``av`` for videos (both are read by PyAV, see
            :mod:`pipeline.sources`), ``gif``, ``img`` or ``frame`` for folders.
        start: seconds, or None for the beginning.
        end: seconds, or None for the end; a later one than the video's counts as the video's.
        frames: sampler, bounds and size; the sample is padded to whole clips.
        seed: of the ``rand`` sampler.
        compat: ``none``, or ``published`` for the frames of the published readers.
        split: published: clips of ``train`` are read as in training, others as outside of it.
        name: what the annotations call a folder of frames that may lie elsewhere for now: TVQA's are known by it.

    Frames are stretched to size x size by Pillow's bicubic filter, one at a time: at most one frame in full size is
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
    try:
        source = opener(path)
        return _take(path, source, choose(source), frames.size)
    except InexactError:
        source = open_straight(path)
        return _take(path, source, choose(source), frames.size)


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
    path: str | Path, start: float | None, end: float | None, frames: Frames, seed: int, source: Source
) -> _Choice:
    first, stop, duration = _clip(path, source, start, end)
    vlen = stop - first
    indices = sample_indices(frames, vlen, source.fps, duration, np.random.default_rng(seed))
    indices = fit_to_clips(indices, vlen, frames.clip_frames)
    return _Choice(indices, first, vlen, source.fps, max(start or 0.0, 0.0), duration, np.empty(0, dtype=np.int64))


def _choose_published(
    path: str | Path,
    reader: str,
    start: float | None,
    end: float | None,
    frames: Frames,
    seed: int,
    split: str,
    source: Source,
) -> _Choice:
    """A clip has both bounds there; with one alone the whole video is read."""
    rng = np.random.default_rng(seed)
    wanted = published.Wanted(frames.sampler, frames.min, frames.max, frames.clip_frames, rng)
    clip = None if start is None or end is None else (start, end)
    try:
        choice = published.choose(wanted, reader, source, clip, split)
        choice.check_clips(frames.clip_frames)
    except ValueError as error:
        reason, where = ("too_few_frames", "") if clip is None else ("bad_clip", f" from {start} s to {end} s")
        raise MediaError(reason, path, f"with compat: published,{where} {error}") from None
    begin = 0.0 if clip is None else max(clip[0], 0.0)
    return _Choice(choice.read, 0, len(source.seconds), choice.fps, begin, choice.duration, choice.nominal)


def _take(path: str | Path, source: Source, choice: _Choice, size: int) -> Decoded:
    """Decode and resize the frames of a choice."""
    distinct, sample = np.unique(choice.indices, return_inverse=True)
    side = (size, size)
    resized = np.empty((len(distinct), *side, 3), dtype=np.uint8)
    count, width, height = 0, 0, 0
    for picture in source.pictures(distinct + choice.first):
        width, height = (width, height) if count else picture.size
        resized[count] = picture.resize(side, Image.Resampling.BICUBIC)
        count += 1
    if count < len(distinct):
        raise MediaError("corrupt", path, f"only {count} of {len(distinct)} frames decode the second time")
    return Decoded(
        frames=resized,
        sample=sample.astype(np.int32),
        frame_index=distinct,
        timestamps=source.seconds[distinct + choice.first],
        nominal=choice.nominal,
        vlen=choice.vlen,
        fps=float(choice.fps),
        start=choice.start,
        duration=float(choice.duration),
        source_width=width,
        source_height=height,
        salvaged=source.salvaged,
    )


def _clip(path: str | Path, source: Source, start: float | None, end: float | None) -> tuple[int, int, float]:
    """The frame numbers [first, stop) of a clip and its duration in seconds."""
    if start is None and end is None:
        return 0, len(source.seconds), len(source.seconds) / source.fps
    low = 0.0 if start is None else max(start, 0.0)
    high = source.end if end is None else min(end, source.end)
    first = int(np.searchsorted(source.seconds, low - _SLACK, "left"))
    stop = int(np.searchsorted(source.seconds, high + _SLACK, "right"))
    if not low < high or first >= stop:  # also for times that are not numbers
        raise MediaError("bad_clip", path, f"no frames from {start} s to {end} s; the video ends at {source.end:.2f} s")
    return first, stop, round(high - low, 6)
