"""The index of a shard root: three memory-mapped Arrow IPC files with the location of every frame and dialogue.

``ROOT/index/media.arrow`` has one row per media item, with the byte range of every frame. ``dialogues.arrow`` has one
row per dialogue, which names rows of the media table. ``shards.arrow`` has one row per shard. Opening the index reads
only the headers of the files. Rows are read from disk when they are first used.
"""

from __future__ import annotations

import hashlib
import itertools
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
from framestream.pipeline.storage import ReadOptions, ReadOptionsError, ShardRef, Storage, is_remote, open_storage
from framestream.pipeline.storage.local import LocalStorage
from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.atomic_io import atomic_file, file_sha256
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import RecordError, parse_record

#: Rows in a record batch. Even with 512 frames per video, list offsets stay far below the limit of int32 (2**31).
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
        ("sample", pa.list_(pa.int32())),  # the sampler's list, as indices into the stored frames
        ("frame_index", pa.list_(pa.int64())),  # of each stored frame, counted from the clip's first
        ("timestamps", pa.list_(pa.float64())),  # of each stored frame, seconds of the source
        ("frame_offset", pa.list_(pa.int64())),  # of each stored frame's JPEG inside the tar
        ("frame_size", pa.list_(pa.int32())),
        ("frame_digest", pa.list_(pa.uint32())),  # of each stored frame's JPEG; null if it was added without digests
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
#: Last column of the media table of a root built with ``compat: published``. Other roots do not have it.
NOMINAL = pa.field("nominal", pa.list_(pa.int64()))  # the frame numbers that the time message counts
ENTRY_FIELDS = ("name", "root", "sampling", "reader", "media_type", "split")  #: of a build record's entries
FRAME_FIELDS = {"sampler", "size", "min", "max", "clip_frames"}  #: of a build record's frames, as far as they are read
FRAME_DIGEST = "frame_digest"  #: column that roots lack which were built before frames had digests
FILES = {"media": MEDIA_SCHEMA, "dialogues": DIALOGUE_SCHEMA, "shards": SHARD_SCHEMA}


def media_schema(compat: str) -> pa.Schema:
    """Return the schema of the media table of a root built with ``compat``."""
    return MEDIA_SCHEMA.append(NOMINAL) if compat == "published" else MEDIA_SCHEMA


def without_digests(schema: pa.Schema) -> pa.Schema:
    """Return a schema of the media table as it was written before frames had digests."""
    return schema.remove(schema.get_field_index(FRAME_DIGEST))


def add_digest_column(media: pa.Table) -> pa.Table:
    """Return a media table with the column ``frame_digest``; it is null if the table did not have it."""
    if FRAME_DIGEST in media.column_names:
        return media
    position = MEDIA_SCHEMA.get_field_index(FRAME_DIGEST)
    field = MEDIA_SCHEMA.field(FRAME_DIGEST)
    return media.add_column(position, field, pa.nulls(len(media), field.type))


def index_digests(root: str | Path) -> dict[str, str]:
    """Return the digest of each file of the index, as build.json records them: name in the root -> digest."""
    names = [f"index/{name}.arrow" for name in FILES]
    return {name: file_digest(Path(root) / name) for name in names}


class ShardsError(ValueError):
    """A shard root cannot be read; one line that names the folder and the fix."""


def build_table(schema: pa.Schema, rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Build a table from ``rows`` (mappings by column), batch by batch, so that list offsets cannot overflow."""
    remaining, batches = iter(rows), []
    while chunk := list(itertools.islice(remaining, BATCH_ROWS)):
        batches.append(pa.RecordBatch.from_pylist(chunk, schema=schema))
    return pa.Table.from_batches(batches, schema=schema)


def write_index(root: str | Path, media: pa.Table, dialogues: pa.Table, shards: pa.Table) -> str:
    """Write the three tables to ``root``/index and return their fingerprint.

    Each file is written completely or not at all. The caller marks the root as finished by writing ``root``/build.json
    with the fingerprint as ``index_fingerprint``.

    Returns:
        sha256 over the digests of the three files, as hex digits.
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
    """The three tables of a finished shard root. Columns are views into memory-mapped files."""

    storage: Storage
    media: pa.Table
    dialogues: pa.Table
    shards: pa.Table
    fingerprint: str  #: sha256 over the three files as hex digits, as the builder recorded it
    specification: Mapping[str, Any]  #: settings of the build that decided the bytes; empty if not recorded
    maps: Mapping[str, MappedTable]  #: the tables' files, by the name of the table

    @classmethod
    def open(cls, root: str | os.PathLike, reading: ReadOptions | None = None, checked: bool = False) -> Index:
        """Open the index of a shard root.

        The files are compared with the digests in build.json and validated, which reads them once.

        Args:
            root: a folder, or an address (:func:`framestream.pipeline.storage.open_storage`). The index of an address
                is copied into the cache folder once.
            reading: how an address is read; defaults apply if None.
            checked: another process of this run has checked the files, so that they are only opened.

        Raises:
            ShardsError: nothing was built there, the build is not finished, a file is damaged, the address cannot be
                read, or ``reading`` does not fit the root.
        """
        try:
            storage = open_storage(root, reading)
            fix = (
                "copy the finished root there again" if storage.remote else f"remove {root} and build the shards again"
            )
            name = str(storage.describe("build.json"))
            build = parse_record(storage.read_all("build.json"), name, "build record", fix, warn=not checked)
            fingerprint, specification, digests = _read_build(build)
            schemas = {**FILES, "media": media_schema(specification.get("compat", "none"))}
            names = [f"index/{name}.arrow" for name in schemas]
            paths = storage.local_copy(names, fingerprint, lambda copies: _check_copies(copies, fingerprint))
            if not checked and not digests.keys() >= set(names):
                _check_copies(paths, fingerprint)
            maps = {
                name: _map(path, schemas[name], digests.get(f"index/{name}.arrow"), checked)
                for name, path in zip(schemas, paths, strict=True)
            }
            largest = max(maps["shards"].table["bytes"].to_pylist(), default=0)
            (reading or ReadOptions()).check_copies(storage.root, largest)
        except (RecordError, ReadOptionsError) as error:
            raise ShardsError(str(error)) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ShardsError(_unreadable(root, error)) from None
        media, dialogues, shards = (maps[name].table for name in FILES)
        return cls(storage, media, dialogues, shards, fingerprint, specification, maps)

    def __reduce__(self) -> tuple:
        """Pickle the paths of the tables: another process of this machine maps them again.

        There it has no connection to a remote root, whose shards it cannot read.
        """
        return _index_of_tables, (str(self.root), dict(self.maps), self.fingerprint, dict(self.specification))

    @property
    def root(self) -> Path | str:
        """The root as messages name it: a path if it is a folder, else the address."""
        return self.storage.root

    def drop_pages(self) -> None:
        """Release the memory of table pages that were read.

        See :class:`framestream.pipeline.utils.arrow_mmap.MappedTable`.
        """
        for mapped in self.maps.values():
            mapped.drop_pages()

    def check_shard_files(self) -> None:
        """Check that the shards of a local root are there with their sizes. Remote ones are checked when they are read.

        Raises:
            ShardsError: one line that names the file.
        """
        sizes = [] if self.storage.remote else self.shards["bytes"].to_pylist()
        for row, size in enumerate(sizes):
            path = Path(self.shard_path(row))
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                problem = "is missing" if found is None else f"has {found:,} of {size:,} bytes"
                raise ShardsError(f"{path}: {problem}; restore the file, or remove {self.root} and build it again")

    def validate_manifest(self, manifest: Manifest) -> None:
        """Check that all shards are there and have the frames and entries that ``manifest`` needs.

        Shards have the frames of the manifest that built them. They also serve smaller and fewer frames, and the
        samplers ``middle`` and ``rand``. They do not serve larger or more frames. Without ``mix`` the entries must be
        those of the build. Shards built with ``compat: published`` have only the frames that are shown. They do not
        serve another sampler, other bounds or another ``compat``.

        Raises:
            ShardsError: one line that names the file or the field.
        """
        self.check_shard_files()
        fix = self._rebuild_hint()
        compat = self.specification.get("compat", "none")
        if compat != manifest.compat:
            raise ShardsError(f"compat: is {manifest.compat}, the shards have {compat}; {fix}")
        self.validate_frames(manifest.frames)
        if manifest.mix:
            return
        fields = ENTRY_FIELDS[1:]
        entries = [(entry.name, *(getattr(entry, name) for name in fields)) for entry in manifest.data.entries]
        built = [
            (entry["name"].partition("~")[0], *(entry[name] for name in fields))
            for entry in self.specification.get("entries", [])
        ]
        if built and built != entries:
            # the first entry that differs; if the manifest only has fewer entries, the first that it lacks
            odd = next((b for a, b in itertools.zip_longest(built, entries) if a != b), None) or built[len(entries)]
            raise ShardsError(f"data.entries: {odd[0]} is not as the shards were built; {fix}")

    def shard_path(self, shard: int) -> Path | str:
        """Return the file of row ``shard`` of the shard table: a path, or an address if the root is one."""
        return self.storage.describe(self.shard(shard).name)

    def shard(self, row: int) -> ShardRef:
        """Return row ``row`` of the shard table, as storages need it."""
        folder, name, size, digest = (
            self.shards[column][row].as_py() for column in ("folder", "name", "bytes", "sha256")
        )
        return ShardRef(f"{folder}/{name}", size, digest)

    def validate_frames(self, wanted: FramesConfig, field: str = "frames") -> None:
        """Check that the shards have the frames that ``wanted`` needs.

        Args:
            wanted: sampler, bounds and size of the frames.
            field: name of the manifest's field, for messages.

        Raises:
            ShardsError: one line that names the field.
        """
        fix = self._rebuild_hint()
        built, published = self.specification.get("frames", {}), self.specification.get("compat") == "published"
        for name in ("sampler", "min", "max", "clip_frames") if published else ():
            if getattr(wanted, name) != built.get(name):
                difference = f"is {getattr(wanted, name)}, the shards have {built.get(name)}"
                raise ShardsError(f"{field}.{name}: {difference}, and compat: published needs the same; {fix}")
        for name in ("size", "max") + (("min",) if wanted.sampler == "dynamic_fps1" else ()):
            if getattr(wanted, name) > built.get(name, getattr(wanted, name)):
                raise ShardsError(f"{field}.{name}: is {getattr(wanted, name)}, the shards have {built[name]}; {fix}")
        if wanted.sampler not in (built.get("sampler", wanted.sampler), "middle", "rand"):
            raise ShardsError(f"{field}.sampler: is {wanted.sampler}, the shards have {built['sampler']}; {fix}")

    def _rebuild_hint(self) -> str:
        return f"remove {self.root} and build it again with this manifest, or use the settings it was built with"


def _index_of_tables(
    root: str, maps: Mapping[str, MappedTable], fingerprint: str, specification: Mapping[str, Any]
) -> Index:
    media, dialogues, shards = (maps[name].table for name in FILES)
    return Index(LocalStorage(root, ReadOptions()), media, dialogues, shards, fingerprint, specification, maps)


def row_values(column: pa.ChunkedArray, row: int) -> np.ndarray:
    """Return the list in ``row`` of a list column as a numpy view: no copy, and not writable."""
    values = column[row].values
    return values.to_numpy(zero_copy_only=True)


def _read_build(build: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Return fingerprint, specification and digests of the index files of a build record.

    Raises:
        ValueError: a field is missing or has another type.
    """
    fingerprint, specification = build.get("index_fingerprint"), build.get("specification", {})
    digests = build.get("digests", {})
    if not isinstance(fingerprint, str) or not re.fullmatch("[0-9a-f]{64}", fingerprint):
        raise ValueError("build.json: index_fingerprint is not a sha256")
    if not isinstance(specification, dict) or not isinstance(digests, dict):
        raise ValueError("build.json: specification and digests must be JSON objects")
    entries, frames = specification.get("entries", []), specification.get("frames", {})
    if not isinstance(entries, list) or not all(_has(entry, ENTRY_FIELDS, str) for entry in entries):
        raise ValueError("build.json: specification.entries has an entry without one of its fields")
    if not isinstance(frames, dict) or not all(
        type(frames[name]) is (str if name == "sampler" else int) for name in FRAME_FIELDS & frames.keys()
    ):
        raise ValueError("build.json: a field of specification.frames has another type")
    return fingerprint, specification, digests


def _has(value: Any, fields: Iterable[str], kind: type) -> bool:
    return isinstance(value, dict) and all(type(value.get(name)) is kind for name in fields)


def _map(path: Path, schema: pa.Schema, digest: str | None, checked: bool) -> MappedTable:
    """Open one file of the index. The media table of an older root lacks the digests of frames."""
    mapped = MappedTable(path, digest, checked)
    found = mapped.table.schema
    if found != schema and not (FRAME_DIGEST in schema.names and found == without_digests(schema)):
        raise ValueError(f"{path.name} has other columns than this version of framestream")
    return mapped


def _check_copies(copies: Sequence[Path], fingerprint: str) -> None:
    digest = hashlib.sha256()
    for path in copies:
        digest.update(file_sha256(path))
    if digest.hexdigest() != fingerprint:
        raise ValueError("its files are not those of build.json")


def _unreadable(root: str | os.PathLike, error: Exception) -> str:
    """Return why the index cannot be opened, and the fix."""
    reason = " ".join(str(error).split())
    if is_remote(root):
        shown = re.sub(r"(?<=://)[^/@]*@", "", str(root)).rstrip("/")  # without user and password
        if isinstance(error, OSError):
            missing = isinstance(error, FileNotFoundError)
            return f"{reason}; there are no finished shards" if missing else reason
        return reason if reason.startswith(shown) else f"{shown}: {reason}; copy the finished root there again"
    fix = f"restore it from a copy, or remove {root} and build the shards again"
    if (Path(root) / "build.json").is_file():
        return f"{root}: the index cannot be read ({reason}); {fix}"
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        if stages := sorted(path.parent.name for path in Path(root).glob("*/build.json")):
            return f"{root}: not the shards of one stage; name one of its folders: {', '.join(stages[:9])}"
        stage = re.fullmatch("stage([0-9]+)", Path(root).name)
        command = f"python tools/build_shards.py --stage {stage[1] if stage else 'N'} --manifest MANIFEST"
        return f"{root}: no finished shards here; build them with `{command}`"
    return f"{root}: the index cannot be read ({reason}); {fix}"
