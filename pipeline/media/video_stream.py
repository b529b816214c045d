"""Open a video file with PyAV and decode its main video stream in display order."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.codec.hwaccel import HWAccel
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.stream import VideoStream

from framestream.pipeline.media.errors import MAX_PIXELS, DecoderError, MediaError
from framestream.pipeline.media.file_kinds import diagnose_open_error
from framestream.pipeline.media.pixels import on_black

#: Containers that are opened. Playlists and scripts (HLS, concat, SDP ...) are not: they make ffmpeg open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,apng,"
    "rm,h264,hevc,m4v,ivf,mxf,nut,dv"
)
#: Decoders that can skip frames to which no other frame refers, whatever the stream contains.
SKIPPING = ("h264", "mpeg4", "mpeg2video", "mpeg1video")
#: Decoders whose key frames need nothing from before them. Others, such as those with palettes, keep state.
SEEKABLE = (
    *SKIPPING,
    *("hevc", "vp8", "libvpx", "vp9", "libvpx-vp9", "av1", "libdav1d", "libaom-av1", "mjpeg", "theora", "prores"),
    *("dnxhd", "ffv1", "flv", "h263", "wmv1", "wmv2", "wmv3", "vc1", "msmpeg4", "msmpeg4v1", "msmpeg4v2", "rawvideo"),
)
#: Tags that are not UTF-8 never matter. PyAV 17 and 18 raise for them unless told otherwise; later ones never do.
TAG_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


#: A demuxer marks packets beside a gap in a transport stream. If a key frame of an earlier time comes within so many
#: packets after one, another stream was joined there, and nothing need be missing.
JOIN_PACKETS = 3


class DamagedStreamError(Exception):
    """The stream is damaged at this point; the frames before it have been returned."""


class _DamagedPacketError(Exception):
    """A packet is damaged; frames that the decoder has buffered may still be good."""


@contextlib.contextmanager
def media_errors(path: str | Path) -> Iterator[None]:
    """Raise every error of PyAV as a MediaError.

    Raises:
        MediaError: corrupt, or unsupported if memory does not suffice.
    """
    try:
        yield
    except MemoryError:
        raise MediaError("unsupported", path, "needs more memory than there is") from None
    except (av.FFmpegError, ArithmeticError, LookupError, ValueError) as error:
        text = getattr(error, "strerror", None) or error
        raise MediaError("corrupt", path, f"is damaged: its video cannot be read ({text})") from None


@contextlib.contextmanager
def open_stream(
    path: Path, strict: bool = False, hwaccel: str = "none"
) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file and yield its container and its main video stream.

    Args:
        strict: make the decoder refuse errors that it would otherwise conceal.
        hwaccel: kind of device that decodes, such as ``cuda``. Codecs that PyAV decodes on no such device are decoded
            on the processor.

    Raises:
        MediaError: the file cannot be opened, or has no video stream that can be decoded.
        DecoderError: the device cannot be used.
    """
    try:
        container = _open_container(path, hwaccel)
    except av.ArgumentError:
        raise diagnose_open_error(path, "unsupported") from None
    except (av.FFmpegError, ValueError, MemoryError):
        raise diagnose_open_error(path) from None
    with media_errors(path), container:
        if not len(container.streams):
            raise diagnose_open_error(path)
        stream = _main_video(container)
        if stream is None:
            raise MediaError("no_video_stream", path, "has no video stream")
        codec = stream.codec_context
        if codec is None:
            raise MediaError("unsupported", path, "its video is damaged or in a codec that is not read")
        if codec.width * codec.height > MAX_PIXELS:
            raise MediaError("unsupported", path, f"{codec.width} x {codec.height} pixels are too many")
        codec.thread_count = 1
        codec.options = {"max_pixels": str(MAX_PIXELS), **({"err_detect": "explode"} if strict else {})}
        yield container, stream


def _open_container(path: Path, hwaccel: str) -> InputContainer:
    options: dict[str, Any] = {"options": {"format_whitelist": FORMATS, "protocol_whitelist": "file"}, **TAG_OPTIONS}
    container = av.open(f"file:{path}", **options)
    if hwaccel == "none" or not any(_is_accelerated(stream, hwaccel) for stream in container.streams.video):
        return container
    container.close()
    try:
        return av.open(f"file:{path}", hwaccel=HWAccel(hwaccel, allow_software_fallback=False), **options)
    except (av.FFmpegError, RuntimeError) as error:
        raise device_error(hwaccel, error) from None


def _is_accelerated(stream: VideoStream, hwaccel: str) -> bool:
    """Return whether PyAV has a decoder of a stream's codec for a kind of device."""
    codec = stream.codec_context
    return codec is not None and any(item.device_type.name == hwaccel for item in codec.codec.hardware_configs)


def device_error(hwaccel: str, error: object) -> DecoderError:
    """Return the error of a device that is missing, or has no driver."""
    text = " ".join(str(error).split())
    fix = "install its driver, or set data.hwaccel: none"
    return DecoderError(f"data.hwaccel: {hwaccel} cannot be used on this machine ({text}); {fix}")


def _main_video(container: InputContainer) -> VideoStream | None:
    """Return the video stream that players show; cover art (an attached picture) does not count."""
    best = cast("VideoStream | None", container.streams.best("video"))
    if best is None or not best.disposition & Disposition.attached_pic:
        return best
    return next((other for other in container.streams.video if not other.disposition & Disposition.attached_pic), None)


def read_packets(container: InputContainer, stream: VideoStream) -> Iterator[tuple[Packet[VideoStream], bool]]:
    """Yield each packet from the container's position on, and whether it is damaged.

    Packets at a join of streams count as sound; whether they decode will show.

    Raises:
        av.FFmpegError: the container is damaged, after the last packet before that.
    """
    source = container.demux(stream)
    ahead: deque[Packet[VideoStream]] = deque()
    failure: av.FFmpegError | None = None
    ended = False
    while True:
        while not ended and len(ahead) <= JOIN_PACKETS and (not ahead or ahead[0].is_corrupt):
            try:
                ahead.append(next(source))
            except StopIteration:
                ended = True
            except av.FFmpegError as error:
                failure, ended = error, True
        if not ahead:
            if failure is not None:
                raise failure
            return
        packet = ahead.popleft()
        yield packet, packet.is_corrupt and not any(_restarts(later, packet) for later in ahead)


def _restarts(later: Packet[VideoStream], packet: Packet[VideoStream]) -> bool:
    """Return whether another stream begins with the packet ``later``, at an earlier time than ``packet``."""
    return later.is_keyframe and _before(later.dts, packet.dts)


def decode_stream(
    container: InputContainer,
    stream: VideoStream,
    needed: Collection[int] | None = None,
    since: int | None = None,
    faults: list[Exception] | None = None,
) -> Iterator[av.VideoFrame]:
    """Decode frames in display order from the container's position to its end.

    Frames that precede the first key frame, in the file or in time, may lack their reference frames. They are skipped
    if they do not decode.

    Args:
        needed: times of the frames that the caller reads; other frames may be skipped. None needs all.
        since: time before which errors do not matter; None stands for the time of the first key frame.
        faults: receives the errors of the frames skipped at the beginning.

    Raises:
        DamagedStreamError: after the last frame before a damaged position.
    """
    return _StreamDecoder(stream, needed, since, [] if faults is None else faults).frames(container)


class _StreamDecoder:
    """State of one pass over the packets of a stream."""

    def __init__(
        self, stream: VideoStream, needed: Collection[int] | None, since: int | None, faults: list[Exception]
    ) -> None:
        self._stream, self._codec = stream, stream.codec_context
        self._needed = needed if self._codec.name in SKIPPING else None
        self._since, self._faults = since, faults
        self._started = False  # the first key frame has been reached
        self._skipping: bool | None = None  # what the decoder is set to; None until it is first set
        self._next_time: int | None = None  # decoding time of the last packet: later frames are not shown before it

    def frames(self, container: InputContainer) -> Iterator[av.VideoFrame]:
        try:
            for packet, is_damaged in read_packets(container, self._stream):
                self._next_time = packet.dts
                yield from self._packet_frames(packet, is_damaged)
            return
        except (av.FFmpegError, _DamagedPacketError):
            pass
        yield from self._buffered_frames()
        raise DamagedStreamError

    def _packet_frames(self, packet: Packet[VideoStream], is_damaged: bool) -> Iterator[av.VideoFrame]:
        """Decode one packet and yield the frames that it completes."""
        if is_damaged and self._started:
            raise _DamagedPacketError
        if packet.is_keyframe and not self._started:
            self._started = True
            self._since = packet.pts if self._since is None else self._since
        self._set_skipping(packet)
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if packet.pts is None or (self._started and not _before(packet.pts, self._since)):
                raise _DamagedPacketError from None
            self._faults.append(error)
            return
        for frame in frames:
            if not frame.is_corrupt:
                yield frame
            elif self._started and not _before(frame.pts, self._since):
                raise DamagedStreamError

    def _set_skipping(self, packet: Packet[VideoStream]) -> None:
        """Let the decoder skip the packet's frame if it is not needed and no other frame refers to it."""
        if self._needed is None or not packet.size:
            return
        skip = packet.pts not in self._needed
        if skip != self._skipping:
            self._skipping = skip
            self._codec.skip_frame = "NONREF" if skip else "DEFAULT"

    def _buffered_frames(self) -> Iterator[av.VideoFrame]:
        """Yield the good frames that the decoder still buffers, up to the time of the damaged packet."""
        with contextlib.suppress(av.FFmpegError):
            for frame in self._stream.decode(None):
                if frame.is_corrupt or not (self._next_time is None or _before(frame.pts, self._next_time)):
                    break
                yield frame


def _before(time: int | None, other: int | None) -> bool:
    """Return whether ``time`` is before ``other``; False if either is unknown."""
    return time is not None and other is not None and time < other


def frame_pixels(frame: av.VideoFrame) -> np.ndarray:
    """Convert a frame to upright RGB pixels, uint8 (H, W, 3); transparent pixels become black."""
    if any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8":
        pixels = on_black(frame.to_ndarray(format="rgba", threads=1))
    else:
        pixels = frame.to_ndarray(format="rgb24", threads=1)
    matrix = _display_matrix(frame)
    if matrix is None:
        return pixels
    if not len(matrix):  # the frame has side data of a kind that PyAV does not know
        return np.rot90(pixels, round(frame.rotation / 90))
    across, down = matrix[[0, 4]]  # a pixel (x, y) is shown at (m0 x + m3 y, m1 x + m4 y)
    if abs(int(matrix[1])) > abs(int(matrix[0])):
        pixels = pixels.transpose(1, 0, 2)
        across, down = matrix[[3, 1]]
    return pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]


def is_mirrored(frame: av.VideoFrame) -> bool:
    """Return whether a frame is shown mirrored, or at an angle that is not a multiple of 90 degrees."""
    matrix = _display_matrix(frame)
    if matrix is None or not len(matrix):
        return False
    a, b, c, d = matrix[[0, 1, 3, 4]].astype(np.int64).tolist()
    return not (b == c == 0 and a * d > 0 or a == d == 0 and b * c < 0)


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Return the display matrix of a frame, int32 (9,); None if it has none, and (0,) if PyAV cannot read it."""
    try:
        # PyAV's stub declares a TypedDict without this key
        display = frame.side_data["DISPLAYMATRIX"]  # type: ignore[typeddict-item]
        return np.frombuffer(bytes(display), np.int32)
    except KeyError:
        return None
    except ValueError:
        return np.empty(0, np.int32)
