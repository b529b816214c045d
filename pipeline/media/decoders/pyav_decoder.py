"""PyAV as a decoder, on the processor or on a device."""

from __future__ import annotations

from pathlib import Path

import av
from av.codec.hwaccel import HWAccel, hwdevices_available

from framestream.pipeline.media.decoders.base import PredictFn
from framestream.pipeline.media.errors import DecoderError, MediaError
from framestream.pipeline.media.video import ResizeFn, VideoSource, open_sequential, open_video
from framestream.pipeline.media.video_stream import device_error


class PyAVDecoder:
    """Reads with :mod:`framestream.pipeline.media.video`."""

    def __init__(self, hwaccel: str = "none") -> None:
        self._hwaccel = hwaccel

    def open(self, path: Path, resize: ResizeFn) -> VideoSource:
        return open_video(path, resize, self._hwaccel)

    def open_sequential(self, path: Path, resize: ResizeFn, predict: PredictFn, min_frames: int) -> VideoSource:
        try:
            return open_sequential(path, resize, predict, min_frames, self._hwaccel)
        except MediaError as error:
            if self._hwaccel == "none" or error.reason not in ("corrupt", "truncated"):
                raise
            text = f"{self._hwaccel} decodes no frame of it; with data.hwaccel: none the processor may"
            raise MediaError("unsupported", path, text) from None


def check_pyav_device(hwaccel: str) -> None:
    """Check that PyAV can decode on a kind of device of this machine.

    Raises:
        DecoderError: it cannot.
    """
    if hwaccel not in hwdevices_available():
        fix = "set data.decoder: ffmpeg, or data.hwaccel: none"
        raise DecoderError(f"data.hwaccel: PyAV {av.__version__} is built without {hwaccel}; {fix}")
    try:
        HWAccel(hwaccel, allow_software_fallback=False).create(av.Codec("h264", "r"))
    except (av.FFmpegError, RuntimeError) as error:
        raise device_error(hwaccel, error) from None
