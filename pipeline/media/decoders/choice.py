"""Choose the decoder of a build, and say which versions decide its pixels."""

from __future__ import annotations

import functools
import importlib.metadata
from pathlib import Path

from framestream.pipeline.media.decoders.base import DecoderConfig, PredictFn, VideoDecoder
from framestream.pipeline.media.decoders.decord_decoder import DecordDecoder, load_decord
from framestream.pipeline.media.decoders.ffmpeg_decoder import FfmpegDecoder, file_is_animated_webp
from framestream.pipeline.media.decoders.ffmpeg_program import check_ffmpeg_device, find_ffmpeg, load_ffmpeg_python
from framestream.pipeline.media.decoders.pyav_decoder import PyAVDecoder, check_pyav_device
from framestream.pipeline.media.errors import check_file
from framestream.pipeline.media.video import ResizeFn, VideoSource


class AutoDecoder:
    """PyAV, and the ffmpeg command of imageio-ffmpeg for animated WebP."""

    def __init__(self, config: DecoderConfig) -> None:
        self._pyav, self._ffmpeg = PyAVDecoder(config.hwaccel), FfmpegDecoder(config, is_pinned=True)

    def open(self, path: Path, resize: ResizeFn) -> VideoSource:
        return self._decoder(path).open(path, resize)

    def open_sequential(self, path: Path, resize: ResizeFn, predict: PredictFn, min_frames: int) -> VideoSource:
        return self._decoder(path).open_sequential(path, resize, predict, min_frames)

    def _decoder(self, path: Path) -> VideoDecoder:
        return self._ffmpeg if file_is_animated_webp(check_file(path)) else self._pyav


@functools.cache
def get_decoder(config: DecoderConfig) -> VideoDecoder:
    """Return the decoder that ``config`` names.

    Raises:
        ValueError: it names none.
    """
    if config.decoder == "auto":
        return AutoDecoder(config)
    if config.decoder == "pyav":
        return PyAVDecoder(config.hwaccel)
    if config.decoder == "decord":
        return DecordDecoder()
    if config.decoder == "ffmpeg":
        return FfmpegDecoder(config)
    raise ValueError(f"decoder {config.decoder!r} is not auto, pyav, decord or ffmpeg")


def decoder_versions(config: DecoderConfig) -> dict[str, str]:
    """Return the versions that decide the pixels of a decoder other than PyAV, by name.

    Raises:
        DecoderError: the decoder is not installed.
    """
    if config.decoder == "decord":
        load_decord()
        return {"decord2": importlib.metadata.version("decord2")}
    if config.decoder == "ffmpeg":
        load_ffmpeg_python()
        return {"ffmpeg": find_ffmpeg().version}
    return {}


def check_decoder(config: DecoderConfig) -> None:
    """Check that a decoder and its device can be used on this machine.

    Raises:
        DecoderError: one line that names the field and the fix.
    """
    decoder_versions(config)
    if config.hwaccel != "none":
        (check_ffmpeg_device if config.decoder == "ffmpeg" else check_pyav_device)(config.hwaccel)
