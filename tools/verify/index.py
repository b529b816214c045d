"""Check the index of a root: first its digest in build.json, then the contents of its tables."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.shards.index import FILES, FRAME_DIGEST, media_schema, without_digests
from framestream.pipeline.utils.atomic_io import file_sha256
from framestream.tools.verify.findings import Findings
from framestream.tools.verify.shard import MEMBERS, ShardToCheck

SPLITS = ("train", "val")
SHARDS_ONLY = "; shards were checked without the index"


class IndexTables(NamedTuple):
    """The three tables of an index, over memory maps."""

    media: pa.Table
    dialogues: pa.Table
    shards: pa.Table

    @classmethod
    def map(cls, root: Path) -> IndexTables:
        """Open the tables of ``root`` without checking them."""
        tables = []
        for name in FILES:
            with pa.memory_map(str(root / "index" / f"{name}.arrow")) as source:
                tables.append(pa.ipc.open_file(source).read_all())
        return cls(*tables)

    def list_shards(self, root: Path) -> list[ShardToCheck]:
        """Return the shards of the index in its order, with what it says about each."""
        shards: list[ShardToCheck] = []
        rows: Counter[str] = Counter()  # rows of the media and the dialogue table before this shard
        for row in self.shards.to_pylist():
            kind = "dialogue" if row["folder"] == "dialogue" else "media"
            facts = {name: row[name] for name in ("folder", "split", "samples", "bytes", "sha256")}
            shards.append(ShardToCheck(root / row["folder"] / row["name"], **facts, first_row=rows[kind]))
            rows[kind] += row["samples"]
        return shards


def check_index(root: Path, record: Mapping[str, Any], findings: Findings) -> IndexTables | None:
    """Open and check the tables of ``root``, whose build.json is ``record``.

    Returns None, and adds a finding, if they cannot be used.
    """
    digest = hashlib.sha256()
    try:
        for name in FILES:
            digest.update(file_sha256(root / "index" / f"{name}.arrow"))
    except OSError as error:
        findings.add(f"index/{name}.arrow", f"cannot be read ({error.strerror}){SHARDS_ONLY}")
        return None
    if digest.hexdigest() != record.get("index_fingerprint"):
        findings.add("index", f"its files do not match index_fingerprint in build.json{SHARDS_ONLY}")
        return None
    specification = record.get("specification")
    if not isinstance(specification, dict):
        findings.add("build.json", f"its specification is not an object{SHARDS_ONLY}")
        return None
    try:
        tables = IndexTables.map(root)
        schemas = {**FILES, "media": media_schema(specification.get("compat", "none"))}
        for (name, schema), table in zip(schemas.items(), tables, strict=True):
            if table.schema not in ([schema, without_digests(schema)] if name == "media" else [schema]):
                raise ValueError(f"{name}.arrow does not have the columns of the format")
            table.validate(full=True)
            if any(table[column].null_count for column in table.column_names if column != FRAME_DIGEST):
                raise ValueError(f"{name}.arrow has missing values")
        _check_shards(tables)
        _check_order(tables)
        _check_keys("media", tables.media, "vi")
        _check_keys("dialogues", tables.dialogues, "d")
        _check_references(tables)
    except (OSError, ValueError, pa.ArrowException) as error:
        findings.add("index", f"{error}{SHARDS_ONLY}", "build the root again")
        return None
    return tables


def _check_shards(tables: IndexTables) -> None:
    """Check that folders and splits exist, shards are numbered without gaps, and no shard is empty."""
    numbers: Counter[tuple[str, str]] = Counter()
    for row in tables.shards.select(["folder", "split", "name", "samples"]).to_pylist():
        folder, split, name = (row[column] for column in ("folder", "split", "name"))
        if folder not in MEMBERS or split not in SPLITS or row["samples"] < 1:
            raise ValueError(f"shards.arrow: {folder!r:.40}, {split!r:.40}, {row['samples']} samples: invalid shard")
        if name != f"{split}-{numbers[folder, split]:06d}.tar":
            raise ValueError(f"shards.arrow: {folder}/{name!r:.40}: expected number {numbers[folder, split]}")
        numbers[folder, split] += 1


def _check_order(tables: IndexTables) -> None:
    """Check that rows are in the order of the shards, one for each of their samples."""
    samples = tables.shards["samples"].to_numpy()
    dialogues = np.array(tables.shards["folder"].to_pylist(), dtype=object) == "dialogue"
    for name, table, mask in (("media", tables.media, ~dialogues), ("dialogues", tables.dialogues, dialogues)):
        if (count := int(samples[mask].sum())) != len(table):
            raise ValueError(f"{name}.arrow has {len(table):,} rows, its shards {count:,} samples")
    if (tables.media["shard"].to_numpy() != np.repeat(np.flatnonzero(~dialogues), samples[~dialogues])).any():
        raise ValueError("media.arrow: its rows are not in the order of shards.arrow")


def _check_keys(name: str, table: pa.Table, letters: str) -> None:
    """Check that keys are well formed and unique. As letters differ by table, they are unique in the root."""
    column = table["key"]
    good = pc.match_substring_regex(column, f"^[{letters}][0-9a-f]{{24}}$")
    if not pc.all(good, min_count=0).as_py():
        raise ValueError(f"{name}.arrow: a key is not one of {' '.join(letters)} followed by 24 hex digits")
    fixed = [chunk.cast(pa.binary()).cast(pa.binary(25)) for chunk in column.chunks]
    parts = [np.frombuffer(chunk.buffers()[1], "S25", len(chunk), chunk.offset * 25) for chunk in fixed if len(chunk)]
    keys = np.sort(np.concatenate([np.empty(0, "S25"), *parts]))
    if (repeated := keys[1:][keys[1:] == keys[:-1]]).size:
        raise ValueError(f"{name}.arrow: {repeated.size:,} keys are repeated, such as {repeated[0].decode()}")


def _check_references(tables: IndexTables) -> None:
    """Check that dialogues name media that exist."""
    for chunk in tables.dialogues["media"].chunks:
        rows = chunk.flatten().to_numpy()
        if rows.size and not 0 <= rows.min() <= rows.max() < len(tables.media):
            raise ValueError("dialogues.arrow: media names rows that media.arrow does not have")
