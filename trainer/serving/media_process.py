"""Decode files of clients in a process of its own, within limits on time, memory, pixels and seconds.

The files are hostile: one may take hours to decode, need more memory than there is, or crash a decoder. The process is
then replaced, and the server goes on. It imports no torch.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import resource
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from PIL import Image

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.media.errors import DecoderError, MediaError
from framestream.pipeline.media.image import FORMATS
from framestream.pipeline.media.video_stream import open_stream
from framestream.pipeline.shards.encode import EncodedMedia
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.errors import RequestError, refused_media

MICROSECONDS = 1_000_000  #: in a second, the unit of a container's duration


@dataclass(frozen=True, slots=True)
class DecodedFile(MediaFile):
    """A file that was encoded as a build would store it, elsewhere."""

    encoded: EncodedMedia | None = None

    def encode(self, manifest: Manifest) -> EncodedMedia:
        """Return what was encoded."""
        if self.encoded is None:
            raise ValueError(f"{self.path}: was not encoded")
        return self.encoded


@dataclass(frozen=True, slots=True)
class DecodeJob:
    """One file to decode."""

    file: MediaFile  #: its reader is empty
    kind: str  #: ``image``, ``video``, or empty for whichever the file is
    param: str  #: the field of the request that names it
    manifest: Manifest | None  #: None to open the file, and decode nothing


class MediaProcess:
    """A decoding process; one thread at a time uses it. It starts with the first job."""

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._process: Any = None
        self._channel: Connection | None = None

    def run(self, job: DecodeJob) -> DecodedFile:
        """Decode the file of a job.

        Raises:
            RequestError: the file cannot be used, or exceeds a limit.
        """
        limit = self._config.decode_seconds
        try:
            channel = self._start()
            channel.send(job)
            if not channel.poll(limit):
                self.close()
                text = f"{job.param}: was not decoded within {limit:g} seconds; send a shorter video"
                raise RequestError(422, text, "decoding_timeout", job.param)
            result = channel.recv()
        except (EOFError, OSError):
            self.close()
            text = f"{job.param}: its decoder ended, because the file is damaged or needs too much memory"
            raise RequestError(422, text, "decoder_failed", job.param) from None
        if isinstance(result, DecodedFile):
            return result
        raise RequestError(*result)

    def close(self) -> None:
        """End the process."""
        process, channel = self._process, self._channel
        self._process = self._channel = None
        if process is not None:
            process.kill()
            process.join()
        if channel is not None:
            channel.close()

    def _start(self) -> Connection:
        if self._channel is not None and self._process.is_alive():
            return self._channel
        self.close()
        context = multiprocessing.get_context("spawn")  # a fork would have the model's threads and locks
        self._channel, inner = context.Pipe()
        self._process = context.Process(target=_serve_jobs, args=(inner, self._config), daemon=True)
        self._process.start()
        inner.close()
        return self._channel


def _serve_jobs(channel: Connection, config: ServingConfig) -> None:
    """Answer jobs until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError, ValueError):  # a lower limit is set already
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + config.decode_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    while True:
        try:
            job = channel.recv()
        except (EOFError, OSError):
            return
        try:
            result: Any = decode_job(job, config)
        except RequestError as error:
            result = error.status, error.message, error.code, error.param
        except MemoryError:
            result = 413, f"{job.param}: needs too much memory; reduce it", "too_large", job.param
        except Exception as error:
            result = 422, f"{job.param}: cannot be decoded ({type(error).__name__})", "corrupt", job.param
        channel.send(result)


def decode_job(job: DecodeJob, config: ServingConfig) -> DecodedFile:
    """Decode the file of a job in this process; without a manifest, nothing is encoded.

    Raises:
        RequestError: the file cannot be used, or exceeds a limit.
    """
    file, param = job.file, job.param
    try:
        _check_image(file.path, config, param)
        reader = file.detect_reader()
        if job.kind == "image":
            reader = IMAGE_READER
        elif job.kind == "video" and reader == IMAGE_READER:
            raise RequestError(415, f"{param}: is an image; give it as image_url", "not_media", param)
        seconds = 0.0 if reader in (IMAGE_READER, "gif") else _check_video(file, config, param)
        if job.manifest is None:
            return DecodedFile(file.path, file.start, file.end, reader)
        _check_seconds(seconds, config, param)
        ready = MediaFile(file.path, file.start, file.end, reader)
        return DecodedFile(file.path, file.start, file.end, reader, ready.encode(job.manifest))
    except MediaError as error:
        raise refused_media(error, file.path, param) from None
    except DecoderError as error:
        raise RequestError(503, f"{param}: {error}", "decoder_failed", param) from None


def _check_image(path: str | Path, config: ServingConfig, param: str) -> None:
    """Refuse an image or a GIF by the size in its header. Other files are left to the decoders, which say why."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        try:
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
        except Image.DecompressionBombError:
            raise RequestError(413, f"{param}: has too many pixels; reduce it", "too_many_pixels", param) from None
        _check_pixels(width, height, config, param)


def _check_video(file: MediaFile, config: ServingConfig, param: str) -> float:
    """Refuse a video by the size of its frames; return the seconds that are shown, if the container states them."""
    with open_stream(Path(file.path)) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        duration = (container.duration or 0) / MICROSECONDS
    _check_pixels(width, height, config, param)
    return min(duration, file.end or duration) - (file.start or 0)


def _check_seconds(seconds: float, config: ServingConfig, param: str) -> None:
    if seconds > config.max_seconds:
        limit = config.max_seconds
        text = f"{param}: shows {seconds:,.0f} seconds, and the limit is {limit:,.0f}; name a part by start and end"
        raise RequestError(413, text, "video_too_long", param)


def _check_pixels(width: int, height: int, config: ServingConfig, param: str) -> None:
    if width * height > config.max_pixels:
        text = f"{param}: has {width} x {height} pixels, and the limit is {config.max_pixels:,}; reduce it"
        raise RequestError(413, text, "too_many_pixels", param)
