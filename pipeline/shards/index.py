"""The index of a shard root: three Arrow IPC files that say where everything is, read through memory maps.

``ROOT/index/media.arrow`` has a row for each media item (with the byte range of every frame), ``dialogues.arrow`` one
for each dialogue (naming rows of the media), ``shards.arrow`` one for each shard. Opening them reads only their
headers; rows are pages of the files.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.storage import ReadOptions, ShardRef, Storage, is_remote, open_storage
from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.atomic_io import atomic_file, file_sha256

#: Rows in a record batch; a batch of 512-frame videos stays far below the 2**31 entries that list offsets can count.
BATCH_ROWS = 4096

MEDIA_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("kind", pa.string()),  # video or image
        ("split", pa.string()),
        ("shard", pa.int32()),  # row of the shard table
        ("offset", pa.int64()),  # of the mp4 or jpg inside the tar
        ("size", pa.int64()),
        ("width", pa.int32()),  # as stored
        ("height", pa.int32()),
        ("source_width", pa.int32()),
        ("source_height", pa.int32()),
        ("vlen", pa.int64()),  # source frames of the clip
        ("fps", pa.float64()),
        ("duration", pa.float64()),  # seconds
        ("start", pa.float64()),  # second of the source at which the clip begins
        ("sample", pa.list_(pa.int32())),  # the sampler's list, as places in the stored frames
        ("frame_index", pa.list_(pa.int64())),  # of each stored frame, counted from the clip's first
        ("timestamps", pa.list_(pa.float64())),  # of each stored frame, seconds of the source
        ("frame_offset", pa.list_(pa.int64())),  # of each stored frame's JPEG inside the tar
        ("frame_size", pa.list_(pa.int32())),
        ("sha256", pa.string()),  # of the mp4 or jpg
        ("source", pa.string()),
    ]
)
DIALOGUE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("entry", pa.string()),
        ("id", pa.string()),
        ("media", pa.list_(pa.int32())),  # rows of the media table, in order of use
        ("conversations", pa.string()),  # JSON list of {"from", "value"}
        ("meta", pa.string()),  # JSON object
    ]
)
SHARD_SCHEMA = pa.schema(
    [
        ("folder", pa.string()),  # video, image or dialogue
        ("split", pa.string()),
        ("name", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
#: Last column of the media of a root built with ``compat: published``; other roots do not have it.
NOMINAL = pa.field("nominal", pa.list_(pa.int64()))  # the frame numbers that the time message counts
FILES = {"media": MEDIA_SCHEMA, "dialogues": DIALOGUE_SCHEMA, "shards": SHARD_SCHEMA}


def media_schema(compat: str) -> pa.Schema:
    """The columns of the media table."""
    return MEDIA_SCHEMA.append(NOMINAL) if compat == "published" else MEDIA_SCHEMA


class ShardsError(ValueError):
    """A shard root that cannot be read: one line that names the folder and the fix."""


def build_table(schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """A table of ``rows`` (mappings by column), built batch by batch so that any number of them is safe."""
    rows, batches = iter(rows), []
    while chunk := list(itertools.islice(rows, BATCH_ROWS)):
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def write_index(root: str | Path, media: pa.Table, dialogues: pa.Table, shards: pa.Table) -> str:
    """Write the three tables to ``root``/index and return their fingerprint (sha256 hex over the files' digests).

    Each file appears whole or not at all. The caller marks the root as finished by writing ``root``/build.json with
    the fingerprint as ``index_fingerprint``.
    """
    folder = Path(root) / "index"
    folder.mkdir(parents=True, exist_ok=True)
    fingerprint = hashlib.sha256()
    for (name, schema), rows in zip(FILES.items(), (media, dialogues, shards), strict=True):
        if NOMINAL.name in rows.column_names:  # of the media alone
            schema = media_schema("published")
        path = folder / f"{name}.arrow"
        with atomic_file(path) as file, pa.ipc.new_file(file, schema) as writer:
            for batch in rows.cast(schema).to_batches(max_chunksize=BATCH_ROWS):
                writer.write_batch(batch)
        fingerprint.update(file_sha256(path))
    return fingerprint.hexdigest()


@dataclass(frozen=True, slots=True)
class Index:
    """The three tables of a finished shard root; columns are views into memory-mapped files."""

    storage: Storage
    media: pa.Table
    dialogues: pa.Table
    shards: pa.Table
    fingerprint: str  #: sha256 hex over the three files, as the builder recorded it
    specification: Mapping[str, Any]  #: what decided the bytes, as the builder recorded it; empty if it did not
    maps: Mapping[str, MappedTable]  #: the files of the tables, by name

    @classmethod
    def open(cls, root: str | os.PathLike, reading: ReadOptions | None = None) -> Index:
        """Open the index of ``root``: a folder, or an address (:func:`framestream.pipeline.storage.open_storage`), whose index is
        copied into the cache folder once.

        Raises:
            ShardsError: nothing was built there, the build is not finished, a file is damaged, or the address cannot
                be read.
        """
        try:
            storage = open_storage(root, reading)
            build = json.loads(storage.read_all("build.json"))
            fingerprint, specification = build["index_fingerprint"], build.get("specification", {})
            schemas = {**FILES, "media": media_schema(specification.get("compat", "none"))}
            names = [f"index/{name}.arrow" for name in schemas]
            paths = storage.local_copy(names, fingerprint, lambda copies: _check_copies(copies, fingerprint))
            maps = {name: _map(path, schemas[name]) for name, path in zip(schemas, paths, strict=True)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardsError(_unreadable(root, error)) from None
        tables = {name: mapped.table for name, mapped in maps.items()}
        made = {"fingerprint": fingerprint, "specification": specification, "maps": maps}
        return cls(storage=storage, **made, **tables)

    @property
    def root(self) -> Path | str:
        """The root as messages name it; a path where it is a folder."""
        return self.storage.root

    def release(self) -> None:
        """Give back the memory of what was read of the tables, see :class:`framestream.pipeline.utils.arrow_mmap.MappedTable`."""
        for mapped in self.maps.values():
            mapped.drop_pages()

    def validate_manifest(self, manifest: Manifest) -> None:
        """Refuse shards that are not all there, or that do not hold what ``manifest`` wants of them.

        Shards hold the frames of the manifest that built them: smaller and fewer frames can be had of them, and other
        samplers that take frames evenly; not larger or more frames, nor other entries, unless they are mixed. Shards
        built with ``compat: published`` hold the frames that are shown, and serve no other sampler, bounds or
        ``compat``.

        Raises:
            ShardsError: one line that names the file or the field.
        """
        sizes = [] if self.storage.remote else self.shards["bytes"].to_pylist()  # remote ones are checked when read
        for row, size in enumerate(sizes):
            path = self.path_of(row)
            there = path.stat().st_size if path.is_file() else -1
            if there != size:
                found = "is missing" if there < 0 else f"has {there:,} of {size:,} bytes"
                raise ShardsError(f"{path}: {found}; bring the file back, or remove {self.root} and build it again")
        again = f"remove {self.root} and build it again with this manifest, or keep to what it was built with"
        compat = self.specification.get("compat", "none")
        if compat != manifest.compat:
            raise ShardsError(f"compat: is {manifest.compat}, the shards have {compat}; {again}")
        self.check_frames(manifest.frames)
        if manifest.mix:
            return
        fields = ("root", "sampling", "reader", "media_type", "split")
        entries = [(entry.name, *(getattr(entry, name) for name in fields)) for entry in manifest.data.entries]
        there = [
            (entry["name"].partition("~")[0], *(entry[name] for name in fields))
            for entry in self.specification.get("entries", [])
        ]
        if there and there != entries:
            odd = next((b for a, b in itertools.zip_longest(there, entries) if a != b), None) or there[len(entries)]
            raise ShardsError(f"data.entries: {odd[0]} is not as the shards were built; {again}")

    def path_of(self, shard: int) -> Path | str:
        """The file of row ``shard`` of the shard table; an address where the root is one."""
        return self.storage.describe(self.shard(shard).name)

    def shard(self, row: int) -> ShardRef:
        """What reading asks for: row ``row`` of the shard table."""
        found = {column: self.shards[column][row].as_py() for column in ("folder", "name", "bytes", "sha256")}
        return ShardRef(f"{found['folder']}/{found['name']}", found["bytes"], found["sha256"])

    def check_frames(self, wanted: FramesConfig, field: str = "frames") -> None:
        """ShardsError where the shards cannot give the frames that ``field`` of a manifest wants."""
        again = f"remove {self.root} and build it again with this manifest, or keep to what it was built with"
        built, published = self.specification.get("frames", {}), self.specification.get("compat") == "published"
        for name in ("sampler", "min", "max", "clip_frames") if published else ():
            if getattr(wanted, name) != built[name]:
                here = f"is {getattr(wanted, name)}, the shards have {built[name]}"
                raise ShardsError(f"{field}.{name}: {here}, as compat: published needs it; {again}")
        for name in ("size", "max") + (("min",) if wanted.sampler == "dynamic_fps1" else ()):
            if getattr(wanted, name) > built.get(name, getattr(wanted, name)):
                raise ShardsError(f"{field}.{name}: is {getattr(wanted, name)}, the shards have {built[name]}; {again}")
        if wanted.sampler not in (built.get("sampler", wanted.sampler), "middle", "rand"):
            raise ShardsError(f"{field}.sampler: is {wanted.sampler}, the shards have {built['sampler']}; {again}")


def row_values(column: pa.ChunkedArray, row: int) -> np.ndarray:
    """The list in ``row`` of a list column as a numpy view (not a copy, not writable)."""
    values = column[row].values
    return values.to_numpy(zero_copy_only=True)


def _map(path: Path, schema: pa.Schema) -> MappedTable:
    mapped = MappedTable(path)
    if mapped.table.schema != schema:
        raise ValueError(f"{path.name} has other columns than this version of framestream")
    return mapped


def _check_copies(copies: Sequence[Path], fingerprint: str) -> None:
    found = hashlib.sha256()
    for path in copies:
        found.update(file_sha256(path))
    if found.hexdigest() != fingerprint:
        raise ValueError("its files are not those of build.json")


def _unreadable(root: str | os.PathLike, error: Exception) -> str:
    """Why there is no index to open, and the fix."""
    reason = " ".join(str(error).split())
    if is_remote(root):
        shown = re.sub(r"(?<=://)[^/@]*@", "", str(root)).rstrip("/")
        if isinstance(error, OSError):
            missing = isinstance(error, FileNotFoundError)
            return f"{reason}; there are no finished shards" if missing else reason
        return reason if reason.startswith(shown) else f"{shown}: {reason}; copy the finished root there again"
    if isinstance(error, FileNotFoundError):
        command = f"python tools/build_shards.py --stage {Path(root).name.removeprefix('stage')} --manifest MANIFEST"
        return f"{root}: no finished shards here; build them with `{command}`"
    return f"{root}: the index cannot be read ({reason}); build the shards again"
