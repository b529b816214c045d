"""What a finished root holds already, when entries are added to it or failures are tried again.

An addition plans what is new alone: samples of entries that the root does not know, samples of entries that could not
be resolved then, and, with ``retry``, what failed for a reason that may have passed. The root's own rows, shards and
numbers stay as they are. Its files are kept as hard links in the plan, because the last steps of a build derive the
new index from them, again after a kill.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, SHARD_SCHEMA, media_schema
from framestream.pipeline.shards.ledger import RETRYABLE
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.tools.builder.build_spec import LEFT_OUT
from framestream.tools.common.arrow_files import map_table

FILES = ("build.json", "index/media.arrow", "index/dialogues.arrow", "index/shards.arrow", "ledger/ledger.parquet")


@dataclass(frozen=True, slots=True)
class ExistingBuild:
    """The record and tables of a finished root; of an empty one where nothing was built."""

    record: Mapping[str, Any]
    media: pa.Table
    dialogues: pa.Table
    shards: pa.Table
    ledger: pa.Table

    @classmethod
    def open(cls, folder: Path, compat: str) -> ExistingBuild:
        """From the links that :func:`keep` made; empty where it was not called."""
        if not (folder / "build.json").is_file():
            schemas = (media_schema(compat), DIALOGUE_SCHEMA, SHARD_SCHEMA, LEDGER_SCHEMA)
            return cls({}, *(schema.empty_table() for schema in schemas))
        return cls(
            json.loads((folder / "build.json").read_bytes()),
            *(map_table(folder / f"{name}.arrow") for name in ("media", "dialogues", "shards")),
            pq.read_table(folder / "ledger.parquet", schema=LEDGER_SCHEMA),
        )


def snapshot(root: Path, folder: Path) -> None:
    """Link the files of a finished ``root`` into ``folder``, where they outlive their replacement."""
    folder.mkdir()
    for name in FILES:
        try:
            os.link(root / name, folder / Path(name).name)
        except OSError:  # a file system without hard links
            shutil.copyfile(root / name, folder / Path(name).name)


@dataclass(frozen=True, slots=True)
class MediaStatus:
    """What a root knows of a media item."""

    built: int = -1  #: its row in the index
    failed: str = ""  #: why it could not be built, if that is not to be tried again
    attempts: int = 0  #: made so far


class Selection:
    """What of the annotation files belongs to an addition to ``previous``."""

    def __init__(self, previous: ExistingBuild, specification: Mapping[str, Any], retry: bool) -> None:
        self._again = set(RETRYABLE) if retry else {"unresolved"}
        there = {entry["name"]: entry for entry in previous.record.get("specification", {}).get("entries", [])}
        self._new, self._open = set(), set()  # entries of which all, and of which only failed samples are planned
        for entry in specification["entries"]:
            before = there.get(entry["name"])
            if before is None or before["annotation"] == LEFT_OUT != entry["annotation"]:
                self._new.add(entry["name"])
            elif retry or before["media"] != entry["media"]:
                self._open.add(entry["name"])
        self._built = _Keys(previous.media["key"])
        ledger = previous.ledger.to_pylist()
        self._media = {row["key"]: row for row in ledger if row["kind"] == "media"}
        self._dialogues = {
            row["key"] for row in ledger if row["kind"] == "dialogue" and row["reason"] in self._again and row["key"]
        }

    def wants_any(self) -> bool:
        """Whether there may be anything to plan."""
        return bool(self._new or (self._open and self._dialogues))

    def entry(self, name: str) -> bool:
        """Whether any sample of the entry may be planned."""
        return name in self._new or name in self._open

    def is_new(self, name: str) -> bool:
        """Whether the root knows nothing of the entry's samples."""
        return name in self._new

    def dialogue(self, entry: str, key: str) -> bool:
        """Whether a sample of the entry is planned."""
        return entry in self._new or key in self._dialogues

    def media(self, key: str) -> MediaStatus:
        """What the root knows of a media item."""
        row = self._media.get(key)
        if row is None:
            return MediaStatus(built=self._built.row(key))
        return MediaStatus(failed="" if row["reason"] in self._again else row["reason"], attempts=row["attempts"])


class _Keys:
    """Rows of keys of one length, found by bisection: 25 bytes a key and no Python objects."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        width = len(column[0].as_py()) if len(column) else 1
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
        """Row of ``key``; -1 where it is not."""
        place = int(np.searchsorted(self._keys, key.encode()))
        found = place < len(self._keys) and self._keys[place] == key.encode()
        return int(self._rows[place]) if found else -1


def drop_rows(ledger: pa.Table, keys: pa.ChunkedArray, entries: set[str]) -> pa.Table:
    """Rows of a ledger less those about ``keys`` (planned again), and less those about ``entries`` as a whole."""
    again = pc.and_(pc.is_in(ledger["key"], keys.combine_chunks()), pc.not_equal(ledger["key"], ""))
    whole = pc.and_(
        pc.equal(ledger["kind"], "entry"), pc.is_in(ledger["entry"], pa.array(sorted(entries), pa.string()))
    )
    return ledger.filter(pc.invert(pc.or_(again, whole)))
