"""Decode the frames of a video that a sampler selects, resized: for building shards and for inference on one video.

    decoded = decode_video("clip.mp4", VideoRequest("decord", manifest.frames, start=12.4, end=27.9))
    decoded.frames[decoded.sample]      # (n, H, W, 3), what the model sees

A clip is the frames shown within [start, end] seconds. The frame that is on the screen at ``start`` belongs to it, even
if it has been there for long. Its time stays that of the source. A clip is sampled as if it were a video of its own,
with its own count of frames and its own duration (end - start). With ``compat="published"`` the frames are those that
the published readers select (:mod:`framestream.pipeline.media.reference_sampling`).

Files that cannot be used raise :class:`MediaError` with a reason. A damaged video is read up to the damage and marked
as salvaged, if it has ``frames.min`` frames (at least ``frames.clip_frames``) before it. A clip that ends before the
damage is not affected. Only damage that the container or the decoder reports is noticed. Packets that a Matroska or FLV
demuxer skips silently are not seen, nor changed bytes in a codec without checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import Path

import numpy as np

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.media import reference_sampling as published
from framestream.pipeline.media.decoders.base import DecoderConfig
from framestream.pipeline.media.decoders.choice import get_decoder
from framestream.pipeline.media.errors import REASONS, MediaError
from framestream.pipeline.media.frame_sequences import open_folder, open_gif
from framestream.pipeline.media.image import encode_image, read_image
from framestream.pipeline.media.resize import resize, stored_size
from framestream.pipeline.media.sampling import pad_to_clips, sample_indices
from framestream.pipeline.media.video import InexactSeekError, ResizeFn, VideoSource, clip_bounds

__all__ = ["REASONS", "Decoded", "MediaError", "VideoRequest", "decode_video", "encode_image", "read_image"]

READERS = ("decord", "av", "gif", "img", "frame")


@dataclass(frozen=True, slots=True)
class VideoRequest:
    """Which frames of a video, or of its clip [start, end], are decoded."""

    #: as annotations name it: ``decord`` or ``av`` for videos (both are read by ``decoding``), ``gif``, ``img`` or
    #: ``frame`` for folders
    reader: str
    frames: FramesConfig  #: sampler, bounds and size; the sample is padded to a multiple of ``clip_frames``
    start: float | None = None  #: seconds; None for the beginning
    end: float | None = None  #: seconds; None, or later than the video's end, for the end
    seed: int = 0  #: of the ``rand`` sampler
    compat: str = "none"  #: ``none``, or ``published`` for the frames of the published readers
    split: str = "train"  #: published: clips of ``train`` are read as in training, others as in evaluation
    name: str = ""  #: a folder's path in the annotations if it is stored elsewhere; TVQA's are recognized by it
    decoding: DecoderConfig = DecoderConfig()  #: the decoder of videos

    @property
    def min_frames(self) -> int:
        """Frames that a damaged video must have before the damage."""
        return max(self.frames.min, self.frames.clip_frames)


@dataclass(frozen=True, slots=True)
class Decoded:
    """The sampled frames of one video or clip."""

    #: uint8 (T, H, W, 3) RGB, distinct frames in time order; the size of ``frames.resize``. Empty if they are encoded.
    frames: np.ndarray
    encoded: list[bytes]  #: the T frames as ``encode`` returned them; empty without it
    width: int  #: pixels of a frame after resizing
    height: int
    sample: np.ndarray  #: int32 (n,) indices into ``frames``, in the sampler's order and with its repeats
    frame_index: np.ndarray  #: int64 (T,) source frame numbers, counted from the clip's first (published: the file's)
    timestamps: np.ndarray  #: float64 (T,) seconds in the source, from the start of the file
    nominal: np.ndarray  #: int64 (N,) frame numbers that the published time message counts; (0,) without ``compat``
    vlen: int  #: source frames of the clip (published: of the file)
    fps: float
    start: float  #: second of the source at which the clip begins
    duration: float  #: seconds of the clip
    source_width: int  #: pixels, upright
    source_height: int
    damage: str  #: where the file is damaged and what is missing, if the frames end there; else empty

    @property
    def salvaged(self) -> bool:
        """Whether the file is damaged, so that fewer frames could be read than it promises."""
        return bool(self.damage)


def decode_video(
    path: str | Path, request: VideoRequest, encode: Callable[[np.ndarray], bytes] | None = None
) -> Decoded:
    """Decode and resize the frames that a request selects of a video, a GIF, or a folder of frames.

    Frames are resized one at a time, as ``frames.resize`` says (:mod:`framestream.pipeline.media.resize`). At most one
    frame of full size is in memory, however long the video.

    Args:
        encode: called with each frame, uint8 (H, W, 3), as soon as it is resized. Then no frames are kept but what it
            returned.

    Raises:
        MediaError: the file is missing, damaged, not a video, or the clip has no frames or no finite bounds.
            Published: the reader fails, or the frames that it reads are not a multiple of ``frames.clip_frames``.
        DecoderError: the decoder that ``request.decoding`` names cannot be used on this machine.
        ValueError: an unknown reader, or bounds that are not multiples of ``frames.clip_frames``.
    """
    _check_clip(path, request)
    decoder = get_decoder(request.decoding)
    opener = _opener(request)
    resizer = _Resizer(path, request.frames, encode)
    select = partial(_select_published if request.compat == "published" else _select, path, request)
    try:
        source = opener(Path(path), resizer)
        return _decode_selection(path, request, source, select(source), resizer)
    except InexactSeekError:
        source = decoder.open_sequential(Path(path), resizer, partial(_predict, select), request.min_frames)
        return _decode_selection(path, request, source, select(source), resizer)


def _check_clip(path: str | Path, request: VideoRequest) -> None:
    """Raise MediaError if the start or the end of a clip is no finite number."""
    for name, seconds in (("start", request.start), ("end", request.end)):
        is_number = isinstance(seconds, Real) and not isinstance(seconds, bool) and math.isfinite(seconds)
        if seconds is not None and not is_number:
            raise MediaError(
                "bad_clip", path, f"{name} is {seconds!r:.40}; it must be a number of seconds, such as 2.5"
            )


def _opener(request: VideoRequest) -> Callable[[Path, ResizeFn], VideoSource]:
    if request.reader not in READERS:
        raise ValueError(f"reader {request.reader!r} is not one of {', '.join(READERS)}")
    if request.reader == "gif":
        return open_gif
    if request.reader not in ("img", "frame"):
        return get_decoder(request.decoding).open
    if request.compat == "published":
        return partial(open_folder, order=published.file_number, name=request.name)
    return partial(open_folder, name=request.name)


class _Resizer:
    """Resize the frames of one video, all to the size that follows from the first, and encode them if asked."""

    def __init__(
        self, path: str | Path, frames: FramesConfig, encode: Callable[[np.ndarray], bytes] | None = None
    ) -> None:
        self._path, self._frames, self.encode = path, frames, encode
        self.source = self.stored = (0, 0)  # (width, height)

    def __call__(self, frame: np.ndarray) -> np.ndarray:
        """Return the resized frame, uint8 (H, W, 3), or its encoded bytes, uint8 (n,)."""
        if not self.stored[0]:
            height, width = frame.shape[:2]
            self.source = width, height
            try:
                self.stored = stored_size(self._frames.resize, self._frames.size, width, height)
            except ValueError as error:
                raise MediaError("unsupported", self._path, str(error)) from None
        resized = resize(frame, *self.stored)
        return resized if self.encode is None else np.frombuffer(self.encode(resized), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class _Selection:
    """Frames selected of a source; the other fields are those of :class:`Decoded`."""

    indices: np.ndarray  #: int64 (n,), counted from ``first``
    first: int  #: number of the clip's first frame in the file
    vlen: int
    fps: float
    start: float
    duration: float
    nominal: np.ndarray


def _select(path: str | Path, request: VideoRequest, source: VideoSource) -> _Selection:
    """Select frames by ``frames.sampler``."""
    first, stop, duration = clip_bounds(path, source, request.start, request.end)
    frames, vlen = request.frames, stop - first
    indices = sample_indices(frames, vlen, source.fps, duration, np.random.default_rng(request.seed))
    indices = pad_to_clips(indices, vlen, frames.clip_frames)
    start = max(request.start or 0.0, 0.0)
    return _Selection(indices, first, vlen, source.fps, start, duration, np.empty(0, dtype=np.int64))


def _select_published(path: str | Path, request: VideoRequest, source: VideoSource) -> _Selection:
    """Select frames as the published readers do: a clip has both bounds; with only one, the full video is read."""
    frames, start, end = request.frames, request.start, request.end
    rng = np.random.default_rng(request.seed)
    sampling = published.SamplingRequest(frames.sampler, frames.min, frames.max, frames.clip_frames, rng)
    clip = None if start is None or end is None else (start, end)
    try:
        selection = published.select_frames(sampling, request.reader, source, clip, request.split)
        selection.check_clips(frames.clip_frames)
    except ValueError as error:
        reason, where = ("too_few_frames", "") if clip is None else ("bad_clip", f" from {start} s to {end} s")
        raise MediaError(reason, path, f"with compat: published,{where} {error}") from None
    return _Selection(
        indices=selection.indices,
        first=0,
        vlen=len(source.seconds),
        fps=selection.fps,
        start=0.0 if clip is None else max(clip[0], 0.0),
        duration=selection.duration,
        nominal=selection.nominal,
    )


def _predict(select: Callable[[VideoSource], _Selection], promised: VideoSource) -> list[int]:
    """Return the numbers of the frames that will be wanted if the file contains what its packets promise."""
    try:
        selection = select(promised)
    except MediaError:
        return []
    return (selection.indices + selection.first).tolist()


def _decode_selection(
    path: str | Path, request: VideoRequest, source: VideoSource, selection: _Selection, resizer: _Resizer
) -> Decoded:
    """Decode and resize the selected frames."""
    salvaged = _is_salvaged(path, request, source, selection)
    distinct, sample = np.unique(selection.indices, return_inverse=True)
    frames, encoded, count = np.empty((0, 0, 0, 3), dtype=np.uint8), [], 0
    for frame in source.decode_frames(distinct + selection.first):
        if resizer.encode:
            encoded.append(frame.tobytes())
        else:
            if not count:
                frames = np.empty((len(distinct), *frame.shape), dtype=np.uint8)
            frames[count] = frame
        count += 1
    if count < len(distinct):
        raise MediaError("corrupt", path, f"only {count} of {len(distinct)} frames decode the second time")
    return Decoded(
        frames=frames,
        encoded=encoded,
        width=resizer.stored[0],
        height=resizer.stored[1],
        sample=sample.astype(np.int32),
        frame_index=distinct,
        timestamps=source.seconds[distinct + selection.first],
        nominal=selection.nominal,
        vlen=selection.vlen,
        fps=float(selection.fps),
        start=selection.start,
        duration=float(selection.duration),
        source_width=resizer.source[0],
        source_height=resizer.source[1],
        damage=_describe_damage(request, source, selection) if salvaged else "",
    )


def _describe_damage(request: VideoRequest, source: VideoSource, selection: _Selection) -> str:
    end = source.promised_end if request.end is None else min(source.promised_end, request.end)
    missing = end - source.end
    lost = f"{missing:.2f} s up to {end:.2f} s are missing" if missing >= 0.01 else "how much is missing is not known"
    return f"the stream is damaged at {source.end:.2f} s; {selection.vlen} frames before that were recovered, {lost}"


def _is_salvaged(path: str | Path, request: VideoRequest, source: VideoSource, selection: _Selection) -> bool:
    """Return whether a file's damage affects the selection; raise MediaError if too few frames come before it."""
    if not source.damaged or (request.end is not None and request.end <= source.end):
        return False
    if selection.vlen < request.min_frames:
        text = f"is damaged, and has only {selection.vlen} frames before that; {request.min_frames} are needed"
        raise MediaError("too_few_frames", path, f"{text}; fetch the file again")
    return True
