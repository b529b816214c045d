"""What a decoder of videos is: its interface, and the settings that choose one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from framestream.pipeline.config.data import DataConfig
from framestream.pipeline.media.video import ResizeFn, VideoSource

PredictFn = Callable[[VideoSource], Collection[int]]  #: numbers of the frames that will be wanted of a source


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Which program decodes videos, and on which device; ``data.decoder`` and ``data.hwaccel`` of a manifest."""

    decoder: str = "auto"  #: of :data:`framestream.pipeline.config.data.DECODERS`
    hwaccel: str = "none"  #: of :data:`framestream.pipeline.config.data.HWACCELS`
    seconds: float = 600.0  #: time limit of one pass over a file, for decoders that run as programs of their own

    @classmethod
    def of(cls, data: DataConfig) -> DecoderConfig:
        """Return the decoder that a manifest's section ``data`` names."""
        return cls(data.decoder, data.hwaccel, float(data.decode_timeout))


class VideoDecoder(Protocol):
    """Opens videos whose frames are numbered by the file's packets, or by decoding them all."""

    def open(self, path: Path, resize: ResizeFn) -> VideoSource:
        """Open a video whose frames are found by their times, as :func:`framestream.pipeline.media.video.open_video`.

        Raises:
            MediaError: the file cannot be used, or this decoder refuses it.
            InexactSeekError: read the file with :meth:`open_sequential`. ``decode_frames`` may raise it, too.
            DecoderError: the decoder cannot be used on this machine.
        """
        ...

    def open_sequential(self, path: Path, resize: ResizeFn, predict: PredictFn, min_frames: int) -> VideoSource:
        """Open a video by decoding all of it, as :func:`framestream.pipeline.media.video.open_sequential`.

        Raises:
            MediaError: the file cannot be used.
            DecoderError: the decoder cannot be used on this machine.
        """
        ...
