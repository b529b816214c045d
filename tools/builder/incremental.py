"""Contents of a finished root, for a build that adds entries to it or retries failures.

An addition plans only what is missing: samples of new entries, samples of entries that could not be resolved before,
and, with ``retry``, what failed for a temporary reason. The root's own rows, shards and numbers do not change. The plan
has hard links to the root's files, because the last steps derive the new index from them, also when repeated after a
kill.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.shards.index import (
    DIALOGUE_SCHEMA,
    FRAME_DIGEST,
    SHARD_SCHEMA,
    add_digest_column,
    media_schema,
    without_digests,
)
from framestream.pipeline.shards.ledger import LEDGER_FILE, RETRYABLE, load_ledger
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.pipeline.utils.records import RecordError, read_record
from framestream.tools.builder.build_spec import LEFT_OUT
from framestream.tools.common.arrow_files import map_table
from framestream.tools.common.errors import BuildError

FILES = ("build.json", "index/media.arrow", "index/dialogues.arrow", "index/shards.arrow", LEDGER_FILE)
_RESTORE = "restore it from a copy, or remove the root and build it again"


@dataclass(frozen=True, slots=True)
class ExistingBuild:
    """The record and tables of a finished root. They are empty for a first build."""

    record: Mapping[str, Any]
    media: pa.Table
    dialogues: pa.Table
    shards: pa.Table
    ledger: pa.Table

    @classmethod
    def open(cls, folder: Path, compat: str) -> ExistingBuild:
        """Open the files that :func:`snapshot` linked into ``folder``; empty if there are none.

        Raises:
            BuildError: a file is damaged.
        """
        if not (folder / "build.json").is_file():
            schemas = (media_schema(compat), DIALOGUE_SCHEMA, SHARD_SCHEMA, LEDGER_SCHEMA)
            media, dialogues, shards, ledger = (schema.empty_table() for schema in schemas)
            return cls({}, media, dialogues, shards, ledger)
        record = read_build_record(folder / "build.json")
        digests = record.get("digests", {})
        try:
            media, dialogues, shards = (
                map_table(folder / Path(name).name, digests.get(name)) for name in FILES if name.endswith(".arrow")
            )
            ledger = load_ledger(folder / Path(LEDGER_FILE).name, digests.get(LEDGER_FILE))
            _require_schemas(
                folder, (media, media_schema(compat)), (dialogues, DIALOGUE_SCHEMA), (shards, SHARD_SCHEMA)
            )
        except (OSError, ValueError) as error:
            raise BuildError(f"the root to add to is damaged: {error}; {_RESTORE}") from None
        return cls(record, add_digest_column(media), dialogues, shards, ledger)


def _require_schemas(folder: Path, *tables: tuple[pa.Table, pa.Schema]) -> None:
    for table, schema in tables:
        if table.schema not in (schema, without_digests(schema) if FRAME_DIGEST in schema.names else schema):
            raise ValueError(f"{folder}: an index file has other columns than this version of framestream")


def read_build_record(path: Path) -> dict[str, Any]:
    """Read a build.json.

    Raises:
        BuildError: it is damaged.
    """
    try:
        record = read_record(path, "build record", f"restore the file, or remove {path.parent} and build it again")
    except RecordError as error:
        raise BuildError(str(error)) from None
    if not _is_complete(record):
        raise BuildError(f"{path}: not a build record (a field is missing or of another type); {_RESTORE}")
    return record


def _is_complete(record: Mapping[str, Any]) -> bool:
    """Return whether a record has the fields that additions read; older ones have no digest that would say so."""
    specification, entries = record.get("specification"), record.get("entries")
    if not isinstance(specification, dict) or not isinstance(record.get("digests", {}), dict):
        return False
    if not isinstance(entries, list) or not isinstance(specification.get("nested_roots"), list):
        return False
    built = specification.get("entries")
    if not isinstance(built, list) or not all(
        isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in ("name", "annotation", "media"))
        for entry in built
    ):
        return False
    return all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and all(type(entry.get(name)) is int for name in ("planned", "dialogues", "media", "frames", "bytes"))
        and isinstance(entry.get("left_out"), dict)
        and all(isinstance(reasons, dict) for reasons in entry["left_out"].values())
        and all(type(count) is int for reasons in entry["left_out"].values() for count in reasons.values())
        for entry in entries
    )


def snapshot(root: Path, folder: Path) -> None:
    """Link the files of a finished ``root`` into ``folder``, so that they survive their replacement in ``root``."""
    folder.mkdir()
    for name in FILES:
        try:
            os.link(root / name, folder / Path(name).name)
        except OSError:  # a file system without hard links
            shutil.copyfile(root / name, folder / Path(name).name)


@dataclass(frozen=True, slots=True)
class MediaStatus:
    """Status of a media item in a root."""

    built: int = -1  #: its row in the index
    failed: str = ""  #: why it could not be built; empty if it is to be retried
    attempts: int = 0  #: failed attempts so far


class Selection:
    """Selects the samples that an addition to ``previous`` plans.

    Args:
        specification: of the new build.
        retry: also plan what failed for a temporary reason.
    """

    def __init__(self, previous: ExistingBuild, specification: Mapping[str, Any], retry: bool) -> None:
        self._retried_reasons = set(RETRYABLE) if retry else {"unresolved"}
        built = {entry["name"]: entry for entry in previous.record.get("specification", {}).get("entries", [])}
        self._new: set[str] = set()  # entries with all samples planned
        self._partial: set[str] = set()  # entries with only failed samples planned
        for entry in specification["entries"]:
            before = built.get(entry["name"])
            if before is None or before["annotation"] == LEFT_OUT != entry["annotation"]:
                self._new.add(entry["name"])
            elif retry or before["media"] != entry["media"]:
                self._partial.add(entry["name"])
        self._built = _SortedKeys(previous.media["key"])
        ledger = previous.ledger.to_pylist()
        self._media = {row["key"]: row for row in ledger if row["kind"] == "media"}
        self._dialogues = {
            row["key"]
            for row in ledger
            if row["kind"] == "dialogue" and row["reason"] in self._retried_reasons and row["key"]
        }

    def may_add(self) -> bool:
        """Return whether there may be anything to plan."""
        return bool(self._new or (self._partial and self._dialogues))

    def includes_entry(self, name: str) -> bool:
        """Return whether any sample of the entry may be planned."""
        return name in self._new or name in self._partial

    def is_new(self, name: str) -> bool:
        """Return whether the root has no samples of the entry."""
        return name in self._new

    def includes_dialogue(self, entry: str, key: str) -> bool:
        """Return whether a sample of the entry is planned."""
        return entry in self._new or key in self._dialogues

    def media_status(self, key: str) -> MediaStatus:
        """Return the status of a media item in the root."""
        row = self._media.get(key)
        if row is None:
            return MediaStatus(built=self._built.row(key))
        return MediaStatus(
            failed="" if row["reason"] in self._retried_reasons else row["reason"], attempts=row["attempts"]
        )


class _SortedKeys:
    """Find the rows of keys of equal length by bisection. Takes 33 bytes for each key and no Python objects."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        width = len(column[0].as_py()) if len(column) else 1
        # fixed-width binary lets numpy view the keys without a copy for each of them
        fixed = [chunk.cast(pa.binary()).cast(pa.binary(width)) for chunk in column.chunks]
        parts = [
            np.frombuffer(chunk.buffers()[1], dtype=f"S{width}", count=len(chunk), offset=chunk.offset * width)
            for chunk in fixed
            if len(chunk)
        ]
        keys = np.concatenate(parts) if parts else np.empty(0, dtype="S1")
        self._rows = np.argsort(keys, kind="stable")
        self._keys = keys[self._rows]

    def row(self, key: str) -> int:
        """Return the row of ``key``, or -1 if it is not present."""
        at = int(np.searchsorted(self._keys, key.encode()))
        present = at < len(self._keys) and self._keys[at] == key.encode()
        return int(self._rows[at]) if present else -1


def drop_rows(ledger: pa.Table, keys: pa.ChunkedArray, entries: set[str]) -> pa.Table:
    """Drop the ledger rows about ``keys``, and the rows of kind "entry" about ``entries``: both are planned again."""
    about_keys = pc.and_(pc.is_in(ledger["key"], keys.combine_chunks()), pc.not_equal(ledger["key"], ""))
    about_entries = pc.and_(
        pc.equal(ledger["kind"], "entry"), pc.is_in(ledger["entry"], pa.array(sorted(entries), pa.string()))
    )
    return ledger.filter(pc.invert(pc.or_(about_keys, about_entries)))
