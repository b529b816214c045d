"""Frames out of video files, GIFs and folders of pictures, one at a time and by number.

Every source knows the second of each of its frames before any is decoded, which is what clips and samplers need:

* ``open_video``: PyAV. Times come from the packets; a frame is found by seeking to its key frame, and is only taken
  when it carries the very time that was asked for. Where that fails, :class:`InexactError` asks for:
* ``open_straight``: PyAV without seeking, twice: once to count what really decodes, once for the frames wanted.
* ``open_gif`` and ``open_folder``: Pillow; GIFs count as 1 frame a second, folders as 1 or, for TVQA, 3.

decord is not used to read sources, because its frames carry no time that could be checked: decord2 3.4 gives up
skipping to a frame after 10,000 polls and returns another one without an error (9 to 18 of 28 frames of a 720p clip
on a busy machine, others at every run), and so do MPEG-4 video with B-frames and open groups of pictures on any.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream
from PIL import Image, ImageSequence

from pipeline.media import MAX_PIXELS, MediaError, check_file, explain_unopened
from pipeline.stills import read_image

#: Containers that are opened. Playlists and scripts (HLS, concat, SDP ...) are not: they make ffmpeg open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,rm,h264,hevc,m4v,ivf,mxf,nut,dv"
)
KEPT_SHARE = 0.5  #: a damaged video of which fewer than this share of its frames decodes is refused


class InexactError(Exception):
    """Seeking in this file does not lead to the frames asked for; read it straight through."""


@dataclass(frozen=True, slots=True)
class Clock:
    """Times of a video's N frames as the file has them."""

    ticks: np.ndarray  #: int64 (N,), ascending: presentation times in units of ``base``
    base: Fraction  #: seconds of a tick
    rate: Fraction  #: frames a second as the container states them


@dataclass(frozen=True, slots=True)
class Source:
    """An opened video of N frames."""

    seconds: np.ndarray  #: float64 (N,), ascending: when each frame is shown, from the start of the file
    fps: float
    end: float  #: second at which the last frame stops being shown
    salvaged: bool  #: fewer frames could be read than the file promises
    pictures: Callable[[np.ndarray], Iterator[Image.Image]]  #: RGB pictures of ascending, distinct frame numbers
    clock: Clock | None = None  #: None for a GIF, a folder, or a file without times or a rate


def open_video(path: str | Path) -> Source:
    """Open a video whose frames are found by seeking; only its packets are read before a frame is asked for.

    Raises:
        MediaError: the file cannot be opened or has no video.
        InexactError: packets are missing or have no times of their own; later, from ``pictures``, a frame is not
            where its packet says, or does not decode.
    """
    path = check_file(path)
    with _open(path) as (container, stream):
        times, keys = [], []  # of every packet in file order; the packets themselves would hold the whole file
        for packet in _packets(container, stream):
            if packet.size and not packet.is_discard:
                times.append(packet.pts)
                if packet.is_keyframe:
                    keys.append(packet.pts)
        if not keys or None in times or len(times) < _promised_frames(stream) or len(set(times)) < len(times):
            raise InexactError("frames or their times are missing")
        ticks, starts = np.sort(np.array(times, dtype=np.int64)), np.sort(np.array(keys, dtype=np.int64))
        seconds = ticks * float(stream.time_base)
        early = _ends_early(stream, seconds[-1])
        seconds -= _origin(container)
        last = _last_duration(stream, seconds)
        fps = _rate(stream, seconds, last)
        clock = _clock(stream, ticks)

    def pictures(wanted: np.ndarray) -> Iterator[Image.Image]:
        with _open(path) as (container, stream):
            errors: list[Exception] = []
            frames, shown = _decode(container, stream, errors), -(2**63)
            for tick in ticks[wanted].tolist():
                start = int(starts[max(np.searchsorted(starts, tick, "right") - 1, 0)])
                if shown < start <= tick:
                    container.seek(start, stream=stream)
                    frames = _decode(container, stream, errors)
                frame = next((frame for frame in frames if frame.pts is None or frame.pts >= tick), None)
                if errors or frame is None or frame.pts != tick:
                    raise InexactError(f"no frame at {tick}")
                shown = tick
                yield _picture(frame)

    return Source(seconds, fps, seconds[-1] + last, early, pictures, clock)


def open_straight(path: str | Path) -> Source:
    """Open a video by decoding all of it, counting the frames that really decode.

    Raises:
        MediaError: the file cannot be opened, has no video, or too little of it decodes.
    """
    path = check_file(path)
    with _open(path) as (container, stream):
        promise, origin, times, ticks, errors = _promised_frames(stream), _origin(container), [], [], []
        for frame in _decode(container, stream, errors):
            times.append(frame.time)
            ticks.append(frame.pts)
        if not times:
            raise MediaError("corrupt", path, "has a video stream but no frame of it decodes; fetch the file again")
        if len(times) < promise * KEPT_SHARE:
            raise MediaError("too_few_frames", path, f"only {len(times)} of {promise} frames decode; fetch it again")
        seconds = np.array([np.nan if time is None else time for time in times], dtype=np.float64)
        early = _ends_early(stream, seconds[-1])
        seconds -= origin
        if not (np.diff(seconds, prepend=-np.inf) > 0).all():  # no times, or times that run backwards
            rate = stream.average_rate or stream.guessed_rate
            seconds = np.arange(len(times)) / float(rate or 1)
            ticks = [None]
        last = _last_duration(stream, seconds)
        fps = _rate(stream, seconds, last)
        clock = None if None in ticks else _clock(stream, np.array(ticks, dtype=np.int64))

    def pictures(wanted: np.ndarray) -> Iterator[Image.Image]:
        rest = iter(wanted.tolist())
        target = next(rest, None)
        with _open(path) as (container, stream):
            for number, frame in enumerate(_decode(container, stream, [])):
                if number == target:
                    yield _picture(frame)
                    target = next(rest, None)
                if target is None:
                    return

    return Source(seconds, fps, seconds[-1] + last, bool(errors) or early or len(times) < promise, pictures, clock)


def open_gif(path: str | Path) -> Source:
    """Open a GIF as 1 frame a second, whatever its own delays; transparent places are black.

    Raises:
        MediaError: the file is not a GIF, or no frame of it decodes.
    """
    path = check_file(path)
    count, broken = 0, False
    try:
        with Image.open(path, formats=("GIF",)) as gif:
            if gif.width * gif.height > MAX_PIXELS:
                raise MediaError("unsupported", path, f"{gif.width} x {gif.height} pixels are too many")
            for frame in ImageSequence.Iterator(gif):
                frame.load()
                count += 1
    except MediaError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, EOFError, ValueError, struct.error ...
        if not count:
            reason = "corrupt" if path.open("rb").read(4) == b"GIF8" else "not_media"
            raise MediaError(reason, path, f"cannot be read as a GIF ({error})") from None
        broken = True

    def pictures(wanted: np.ndarray) -> Iterator[Image.Image]:
        rest = set(wanted.tolist())
        with Image.open(path, formats=("GIF",)) as gif:
            for number, frame in zip(range(int(wanted[-1]) + 1), ImageSequence.Iterator(gif), strict=False):
                if number in rest:
                    frame = frame.convert("RGBA")
                    yield Image.alpha_composite(Image.new("RGBA", frame.size, "black"), frame).convert("RGB")

    return Source(np.arange(count, dtype=np.float64), 1.0, float(count), broken, pictures)


def last_number(name: str) -> int:
    """What orders the files of a folder: the last number in a name, -1 where there is none."""
    numbers = re.findall(r"\d+", Path(name).stem)
    return int(numbers[-1]) if numbers else -1


def open_folder(path: str | Path, order: Callable[[str], int] = last_number, name: str = "") -> Source:
    """Open a folder of jpg, jpeg and png frames, ordered by what ``order`` makes of their names, then by name.

    There are 3 frames a second if ``name`` (``path``, if it is empty) contains tvqa.

    Raises:
        MediaError: no such folder, or no pictures in it. ``pictures`` raises it for a broken picture.
    """
    path = Path(path)
    try:
        names = sorted(item.name for item in path.iterdir() if item.suffix.lower() in (".jpg", ".jpeg", ".png"))
    except OSError as error:
        raise MediaError("missing_file", path, f"the folder of frames cannot be read ({error.strerror})") from None
    if not names:
        raise MediaError("not_media", path, "the folder has no jpg, jpeg or png files")
    names.sort(key=order)
    fps = 3.0 if "tvqa" in (name or str(path)) else 1.0

    def pictures(wanted: np.ndarray) -> Iterator[Image.Image]:
        return (read_image(path / names[number]) for number in wanted.tolist())

    return Source(np.arange(len(names)) / fps, fps, len(names) / fps, False, pictures)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """A video file and its main video stream, or the MediaError that says why there is none."""
    try:
        container = av.open(f"file:{path}", options={"format_whitelist": FORMATS, "protocol_whitelist": "file"})
    except av.ArgumentError:
        raise MediaError("unsupported", path, "is in a container format that is not read") from None
    except (av.FFmpegError, ValueError):
        raise explain_unopened(path) from None
    with container:
        if not len(container.streams):
            raise explain_unopened(path)
        stream = container.streams.best("video")
        if stream is None:
            raise MediaError("no_video_stream", path, "has no video stream")
        codec = stream.codec_context
        if codec is None:
            raise MediaError("unsupported", path, "its video is damaged or in a codec that is not read")
        if codec.width * codec.height > MAX_PIXELS:
            raise MediaError("unsupported", path, f"{codec.width} x {codec.height} pixels are too many")
        codec.thread_count = 1
        yield container, stream


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Packets of the stream up to the end of the file or the first place that cannot be read; then the flush packet."""
    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


def _picture(frame: av.VideoFrame) -> Image.Image:
    """The frame in RGB, upright."""
    pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return Image.fromarray(np.ascontiguousarray(pixels))


def _decode(container: InputContainer, stream: VideoStream, errors: list[Exception]) -> Iterator[av.VideoFrame]:
    """Frames in display order; what does not decode is left out and noted in ``errors``."""
    flushed = False
    for packet in _packets(container, stream):
        flushed = not packet.size
        try:
            yield from packet.decode()
        except av.FFmpegError as error:
            errors.append(error)
    if not flushed:  # reading ended early: the decoder still holds frames
        with contextlib.suppress(av.FFmpegError):
            yield from stream.decode(None)


def _promised_frames(stream: VideoStream) -> int:
    """Frames that the container's index lists, less those that an edit list hides; 0 where it does not say."""
    if not stream.frames:
        return 0
    return sum(not entry.is_discard for entry in stream.index_entries) or stream.frames


def _origin(container: InputContainer) -> float:
    """Second that players show as 0: where the file's earliest stream begins (transport streams begin anywhere)."""
    return max(container.start_time or 0, 0) / av.time_base


def _clock(stream: VideoStream, ticks: np.ndarray) -> Clock | None:
    rate = stream.average_rate
    return Clock(ticks, stream.time_base, rate) if rate and stream.time_base else None


def _last_duration(stream: VideoStream, seconds: np.ndarray) -> float:
    """How long the last frame is shown: the mean distance of frames, or that of the nominal rate."""
    if len(seconds) > 1:
        return (seconds[-1] - seconds[0]) / (len(seconds) - 1)
    rate = stream.average_rate or stream.guessed_rate
    return 1 / float(rate) if rate else 1.0


def _rate(stream: VideoStream, seconds: np.ndarray, last: float) -> float:
    """Frames a second as the container states it, or as the times have it where the two are far apart."""
    measured = len(seconds) / (seconds[-1] - seconds[0] + last)
    stated = float(stream.average_rate or stream.guessed_rate or measured)
    return stated if abs(stated - measured) <= 0.1 * measured else measured


def _ends_early(stream: VideoStream, last: float) -> bool:
    """Whether Matroska's DURATION (the second at which the stream ends) lies over a second past the last frame."""
    hours, _, rest = stream.metadata.get("DURATION", "").partition(":")
    minutes, _, seconds = rest.partition(":")
    try:
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds) - last > 1 + 2 / float(stream.average_rate or 1)
    except ValueError:
        return False
