"""A few files as an index in memory: asked about without a build, they are seen exactly as if they had been built.

visuals = Handfuls(manifest).visuals([File("clip.mp4", start=12.4, end=27.9)])
visuals.views([0])
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from PIL import Image

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.media.errors import MediaError, check_file
from framestream.pipeline.media.sampling import media_seed
from framestream.pipeline.shards.encode import EncodedMedia, encode_image_file, encode_video
from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, SHARD_SCHEMA, Index, build_table, media_schema
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.shards.samples import media_key
from framestream.pipeline.storage import ShardRef

IMAGE_READER = "still"  #: how pictures are read
CACHE_SIZE = 4  #: lists of files that stay decoded, because several questions are asked about the same


@dataclass(frozen=True, slots=True)
class MediaFile:
    """A video, GIF, picture or folder of frames, or a clip of a video."""

    path: str | Path
    start: float | None = None  #: seconds of the source at which a clip begins
    end: float | None = None
    reader: str = ""  #: how it is read: :data:`STILL`, or a reader of annotations; by what is in the file if empty

    def detect_reader(self) -> str:
        """The reader, told from the file where none is named.

        Raises:
            MediaError: there is no such file, or it is empty.
        """
        if self.reader:
            return self.reader
        if Path(self.path).is_dir():
            return "img"
        try:
            with Image.open(check_file(self.path)) as picture:
                return {"GIF": "gif", "MPEG": "decord"}.get(picture.format, IMAGE_READER)
        except (OSError, Image.DecompressionBombError, SyntaxError, ValueError):
            return "decord"

    def encode(self, manifest: Manifest) -> EncodedMedia:
        """What a build with ``manifest`` would store.

        Raises:
            MediaError: the file cannot be used; one line that names it.
        """
        reader, bounds = self.detect_reader(), (self.start, self.end)
        if reader != IMAGE_READER:
            seed = media_seed(manifest.seed, self.key)
            return encode_video(Path(self.path), reader, *bounds, manifest.frames, seed, manifest.compat, split="val")
        if bounds != (None, None):
            raise MediaError("bad_clip", self.path, "is a picture; only videos have a start and an end")
        return encode_image_file(Path(self.path), manifest.images)

    @property
    def key(self) -> str:
        """A key for the medium, by path and clip."""
        return media_key("video", f"{self.path}:{self.start}:{self.end}")


def build_memory_index(files: Sequence[MediaFile], manifest: Manifest) -> Index:
    """An index whose media table has a row for each of ``files``, in order, and no dialogues.

    Raises:
        MediaError: a file cannot be used; one line that names it.
    """
    media, shards, data, schema = [], [], [], media_schema(manifest.compat)
    for number, file in enumerate(files):
        made = file.encode(manifest)
        kind = "image" if file.detect_reader() == IMAGE_READER else "video"
        place = {"split": "val", "shard": number, "offset": 0, "size": len(made.data)}
        digest = hashlib.sha256(made.data).hexdigest()
        names = {"key": file.key, "kind": kind, "source": str(file.path), "sha256": digest}
        media.append({**made.columns, **place, **names})
        name = f"{number}.{'jpg' if kind == 'image' else 'mp4'}"
        size = {"samples": 1, "bytes": len(made.data), "sha256": digest}
        shards.append({"folder": kind, "split": "val", "name": name, **size})
        data.append(made.data)
    tables = {
        "media": build_table(schema, ({name: row[name] for name in schema.names} for row in media)),
        "dialogues": pa.Table.from_pylist([], schema=DIALOGUE_SCHEMA),
        "shards": build_table(SHARD_SCHEMA, shards),
    }
    names = [f"{row['folder']}/{row['name']}" for row in shards]
    storage = _Memory(dict(zip(names, data, strict=True)), {n: str(f.path) for n, f in zip(names, files, strict=True)})
    return Index(storage=storage, fingerprint="", specification={}, maps={}, **tables)


class MediaFileCache:
    """What is shown of files under one manifest; the last few lists of files stay decoded."""

    def __init__(self, manifest: Manifest) -> None:
        self._visuals = functools.lru_cache(CACHE_SIZE)(
            lambda files: MediaViews(build_memory_index(files, manifest), manifest)
        )

    def media_views(self, files: Sequence[MediaFile]) -> MediaViews:
        """Visuals whose media table has a row for each of ``files``, in order.

        Raises:
            MediaError: a file cannot be used; one line that names it.
        """
        return self._visuals(tuple(files))


class _Memory:
    """A storage of bytes by name; see :class:`framestream.pipeline.storage.base.Storage`."""

    root, remote, folder = Path(), False, Path()

    def __init__(self, files: dict[str, bytes], shown: dict[str, str]) -> None:
        self._files, self._shown = files, shown

    def read(self, shard: ShardRef, ranges: Sequence[tuple[int, int]]) -> Iterator[memoryview]:
        data = memoryview(self._files[shard.name])
        return (data[offset : offset + size] for offset, size in ranges)

    def read_all(self, name: str) -> bytes:
        if name not in self._files:
            raise FileNotFoundError(name)
        return self._files[name]

    def local_copy(self, names: Sequence[str], version: str, check: Callable[[Sequence[Path]], None]) -> list[Path]:
        raise FileNotFoundError(f"{', '.join(names)}: in memory only")

    def describe(self, name: str) -> str:
        return self._shown[name]
