"""In-memory index for a few media files.

It lets you run inference on raw files with the same preprocessing as built shards::

    media_views = MediaFileCache(manifest).media_views([MediaFile("clip.mp4", start=12.4, end=27.9)])
    media_views.views([0])
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.media.decode import VideoRequest
from framestream.pipeline.media.decoders.base import DecoderConfig
from framestream.pipeline.media.errors import DecoderError, MediaError, check_file
from framestream.pipeline.media.sampling import media_seed
from framestream.pipeline.shards.encode import EncodedMedia, encode_image_file, encode_video
from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, SHARD_SCHEMA, Index, build_table, media_schema
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.shards.samples import media_key
from framestream.pipeline.storage import ShardRef

IMAGE_READER = "still"  #: name of the reader of images
CACHE_SIZE = 4  #: lists of files that stay decoded, for further questions about the same files


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A video, GIF, image or folder of frames, or a clip of a video."""

    path: str | Path
    start: float | None = None  #: start of the clip in seconds of the source; None for the beginning
    end: float | None = None  #: end of the clip in seconds of the source; None for the end
    #: :data:`IMAGE_READER`, or a reader that annotations may name; if empty, detected from the file's content
    reader: str = ""

    def detect_reader(self) -> str:
        """Return the reader; if none is named, detect it from the file's content.

        Raises:
            MediaError: the file is missing or empty.
        """
        if self.reader:
            return self.reader
        if Path(self.path).is_dir():
            return "img"
        try:
            with Image.open(check_file(self.path)) as image:
                if image.format in ("PNG", "WEBP") and getattr(image, "is_animated", False):
                    return "decord"
                return {"GIF": "gif", "MPEG": "decord"}.get(image.format or "", IMAGE_READER)
        except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
            return "decord"

    def encode(self, manifest: Manifest) -> EncodedMedia:
        """Encode the file as a build with ``manifest`` would store it.

        Raises:
            MediaError: the file cannot be used; one line that names it.
        """
        reader, bounds = self.detect_reader(), (self.start, self.end)
        if reader != IMAGE_READER:
            seed = media_seed(manifest.seed, self.key)
            decoding = DecoderConfig.of(manifest.data)
            request = VideoRequest(reader, manifest.frames, *bounds, seed, manifest.compat, "val", decoding=decoding)
            try:
                return encode_video(Path(self.path), request)
            except DecoderError as error:
                raise MediaError("unsupported", self.path, str(error)) from None
        if bounds != (None, None):
            raise MediaError("bad_clip", self.path, "is an image; only videos have a start and an end")
        return encode_image_file(Path(self.path), manifest.images)

    @property
    def key(self) -> str:
        """A key for the file, derived from its path and clip."""
        return media_key("video", f"{self.path}:{self.start}:{self.end}")


def build_memory_index(files: Sequence[MediaFile], manifest: Manifest) -> Index:
    """Build an index whose media table has one row for each of ``files``, in order, and no dialogues.

    Raises:
        MediaError: a file cannot be used; one line that names it.
    """
    media: list[dict[str, Any]] = []
    shards: list[dict[str, Any]] = []
    data, paths = {}, {}
    schema = media_schema(manifest.compat)
    for number, file in enumerate(files):
        encoded = file.encode(manifest)
        kind = "image" if file.detect_reader() == IMAGE_READER else "video"
        digest = hashlib.sha256(encoded.data).hexdigest()
        # each file is a shard of its own: a named byte string in memory, whose only member begins at offset 0
        location = {"split": "val", "shard": number, "offset": 0, "size": len(encoded.data)}
        names = {"key": file.key, "kind": kind, "source": str(file.path), "sha256": digest}
        media.append({**encoded.columns, **location, **names})
        name = f"{number}.{'jpg' if kind == 'image' else 'mp4'}"
        size = {"samples": 1, "bytes": len(encoded.data), "sha256": digest}
        shards.append({"folder": kind, "split": "val", "name": name, **size})
        data[f"{kind}/{name}"], paths[f"{kind}/{name}"] = encoded.data, str(file.path)
    return Index(
        storage=_MemoryStorage(data, paths),
        media=build_table(schema, ({name: row[name] for name in schema.names} for row in media)),
        dialogues=pa.Table.from_pylist([], schema=DIALOGUE_SCHEMA),
        shards=build_table(SHARD_SCHEMA, shards),
        fingerprint="",
        specification={},
        maps={},
    )


class MediaFileCache:
    """Media views of files under one manifest. The last :data:`CACHE_SIZE` lists of files stay decoded."""

    def __init__(self, manifest: Manifest) -> None:
        self._cached_views = functools.lru_cache(CACHE_SIZE)(
            lambda files: MediaViews(build_memory_index(files, manifest), manifest)
        )

    def media_views(self, files: Sequence[MediaFile]) -> MediaViews:
        """Return media views whose media table has one row for each of ``files``, in order.

        Raises:
            MediaError: a file cannot be used; one line that names it.
        """
        return self._cached_views(tuple(files))


class _MemoryStorage:
    """Byte strings by name, as a :class:`framestream.pipeline.storage.base.Storage`."""

    root: Path | str = Path()
    remote = False
    derived_folders: list[Path] = []  # nothing is derived from it

    def __init__(self, data: dict[str, bytes], paths: dict[str, str]) -> None:
        self._data, self._paths = data, paths  # paths: the file that messages name, by shard name

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        data = memoryview(self._data[shard.name])
        return (data[offset : offset + size] for offset, size in ranges)

    def prefetch(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> bool:
        return False

    def read_in_order(self, shard: ShardRef, offset: int, size: int) -> Iterator[bytes]:
        yield self._data[shard.name][offset : offset + size]

    def read_all(self, name: str) -> bytes:
        if name not in self._data:
            raise FileNotFoundError(name)
        return self._data[name]

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        raise FileNotFoundError(f"{', '.join(names)}: in memory only")

    def describe(self, name: str) -> str:
        return self._paths[name]
