"""Media of requests: from references to files on the disk, and from files to what the model is shown of them."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import queue
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.pixel_stream import read_pixels
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, build_memory_index
from framestream.trainer.inference.byte_cache import ByteCache
from framestream.trainer.serving.config import MIB, ServingConfig
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.fetch import fetch_file
from framestream.trainer.serving.media_process import DecodedFile, DecodeJob, MediaProcess
from framestream.trainer.serving.requests import MediaReference
from framestream.trainer.serving.uploads import PrivateFile, UploadStore

KNOWN_KINDS = 10_000  #: files whose kind is remembered
DECODED_BYTES = 256 * MIB  #: of sampled frames, as JPEGs, that stay in memory for the next question
MAX_SHOWN = 40  #: characters of an address that messages repeat
MAX_PATH = 1024  #: characters of a text that is taken for a path, rather than for base64 without ``data:``
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?(;[\w.+-]+=[\w.+\"-]*)*(;base64)?,", re.ASCII)


@dataclass(frozen=True, slots=True)
class RequestMedia:
    """A media item of a request, as a file."""

    file: PrivateFile
    kind: str  #: ``image``, ``video``, or empty for whichever the file is
    param: str  #: the field of the request that names it
    start: float | None = None
    end: float | None = None

    @property
    def key(self) -> tuple:
        """What decides its frames, besides settings."""
        return self.file.digest, self.kind, self.start, self.end


def receive_media(reference: MediaReference, store: UploadStore, config: ServingConfig) -> RequestMedia:
    """Turn a reference into a file of the request. It waits for the disk and the network.

    Raises:
        RequestError: the bytes are not there, are too many, or may not be fetched.
    """
    param = reference.param
    if reference.file_id:
        file = store.link(reference.file_id)
    elif reference.url.startswith("data:"):
        file = store.copy(io.BytesIO(decode_data_url(reference.url, param)), param)
    elif not reference.url.lower().startswith(("http://", "https://")):
        text = f"{param}: {_describe_other(reference.url)}; upload the file, or send a data: URL"
        raise RequestError(400, text, "invalid_url", param)
    elif not config.allow_urls:
        text = f"{param}: this server fetches no addresses; upload the file, or send a data: URL"
        raise RequestError(400, text, "urls_not_allowed", param)
    else:
        with fetch_file(reference.url, param, config.max_upload_bytes, config.fetch_seconds) as source:
            file = store.copy(source, param)
    return RequestMedia(file, reference.kind, param, reference.start, reference.end)


def _describe_other(url: str) -> str:
    """Say what a text is that is no address of a kind that is read."""
    if scheme := re.match(r"[A-Za-z][\w+.-]+(?=:)", url[:MAX_SHOWN], re.ASCII):
        return f"addresses of the kind {scheme[0]!r} are not read"
    kind = "a path" if len(url) <= MAX_PATH and re.search(r"[./\\]", url) else "no address"
    return f"{url[:MAX_SHOWN]!r} is {kind}"


def decode_data_url(url: str, param: str) -> bytes:
    """Return the bytes of a data: URL in base64.

    Raises:
        RequestError: it has another form.
    """
    head = _DATA.match(url[:1000])
    try:
        if head is None or head[3] is None:
            raise ValueError
        return base64.b64decode(url[head.end() :], validate=True)
    except (ValueError, binascii.Error):
        text = f"{param}: is not a data: URL in base64; write data:video/mp4;base64,..."
        raise RequestError(400, text, "invalid_url", param) from None


def limit_frames(manifest: Manifest, frames: int | None) -> Manifest:
    """Return the manifest with at most ``frames`` sampled frames of a video, in complete clips and at least one."""
    settings = manifest.frames
    if frames is None or frames >= settings.max:
        return manifest
    most = max(frames // settings.clip_frames, 1) * settings.clip_frames
    return dataclasses.replace(manifest, frames=dataclasses.replace(settings, max=most, min=min(settings.min, most)))


@dataclass(frozen=True, slots=True)
class ShownMedia:
    """What the model is shown of a media item, with its pixels."""

    view: MediaView
    times: list[float]  #: second in the source of each frame of a video
    pixels: np.ndarray  #: uint8, clips (n, T, S, S, 3) of a video or tiles (n, S, S, 3) of an image


class UploadReader:
    """Decodes files in processes, and keeps the last results. Threads may share it."""

    def __init__(self, config: ServingConfig) -> None:
        self._decoded: ByteCache[DecodedFile] = ByteCache(DECODED_BYTES)
        self._kinds: ByteCache[str] = ByteCache(KNOWN_KINDS)  # each counts as one byte
        self._processes: queue.SimpleQueue[MediaProcess] = queue.SimpleQueue()
        self._all = [MediaProcess(config) for _ in range(config.decode_processes)]
        for process in self._all:
            self._processes.put(process)

    def kind(self, media: RequestMedia, manifest: Manifest) -> str:
        """Return ``image`` or ``video``, whichever a media item is shown as. A file that is not known is decoded.

        Raises:
            RequestError: the file cannot be used, or exceeds a limit.
        """
        known = media.kind or self._kinds.get(media.key)
        if known is None:
            known = "image" if self._decode(media, manifest).reader == IMAGE_READER else "video"
            self._kinds.put(media.key, known, 1)
        return known

    def check(self, file: PrivateFile, param: str) -> None:
        """Open a file as a request would, and decode nothing.

        Raises:
            RequestError: it is no video or image, is damaged at its start, or has too many pixels.
        """
        with self._borrowed() as process:
            process.run(DecodeJob(MediaFile(file.path), "", param, None))

    def show(self, media: RequestMedia, manifest: Manifest, several: bool) -> ShownMedia:
        """Decode a media item, and return what the model is shown.

        Args:
            several: the request has several images; each is then padded and has one tile.

        Raises:
            RequestError: the file cannot be used, or exceeds a limit.
        """
        decoded = self._decode(media, manifest)
        views = MediaViews(build_memory_index([decoded], manifest), manifest)
        try:
            view = views.views([0, 0] if several else [0])[0]
            return _read_pixels(views, view, manifest)
        except ValueError as error:
            reason = " ".join(str(error).split()).replace(f"{decoded.path}: ", "")
            raise RequestError(422, f"{media.param}: {reason}", "corrupt", media.param) from None

    def close(self) -> None:
        """End the processes."""
        for process in self._all:
            process.close()

    def _decode(self, media: RequestMedia, manifest: Manifest) -> DecodedFile:
        key = (*media.key, manifest.frames.max)
        if (found := self._decoded.get(key)) is not None:
            return found
        file = MediaFile(media.file.path, media.start, media.end)
        with self._borrowed() as process:
            decoded = process.run(DecodeJob(file, media.kind, media.param, manifest))
        self._decoded.put(key, decoded, len(decoded.encode(manifest).data))
        return decoded

    @contextmanager
    def _borrowed(self) -> Iterator[MediaProcess]:
        process = self._processes.get()
        try:
            yield process
        finally:
            self._processes.put(process)


def _read_pixels(views: MediaViews, view: MediaView, manifest: Manifest) -> ShownMedia:
    clips, tiles = read_pixels(views, [view], manifest.frames)
    if view.kind == "image":
        return ShownMedia(view, [], tiles)
    _, seconds, _, _ = views.frame_times(view)
    return ShownMedia(view, seconds.tolist(), clips)
