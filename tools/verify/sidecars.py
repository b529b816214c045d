"""What stands beside the shards of a root: build.json and the ledger, files for other readers, and leftovers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from framestream.pipeline.shards.ledger import KINDS, REASONS
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.tools.verify.findings import Findings
from framestream.tools.verify.index import SPLITS, Tables
from framestream.tools.verify.shard import MEMBERS, ShardToCheck

MAX_TEXT = 1 << 28  #: bytes of a JSON or YAML file that is parsed
REMOVE = "remove it"
COUNTS = ("planned", "dialogues", "media", "frames", "bytes")  #: of an entry in build.json
DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}


def read_object(root: Path, name: str, findings: Findings) -> dict[str, Any]:
    """The object in a JSON or YAML file of ``root``; empty, and a finding, where there is none."""
    kind, path = ("YAML" if name.endswith(".yaml") else "JSON"), root / name
    try:
        if path.stat().st_size > MAX_TEXT:
            raise ValueError("far too long")
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if kind == "YAML" else json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("no object")
        return value
    except OSError as error:
        findings.add(name, f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        findings.add(name, f"is not the {kind} of a build ({str(error) or 'nested too deeply'})")
    return {}


def check_leftovers(root: Path, shards: Sequence[ShardToCheck], findings: Findings) -> None:
    """Nothing is left over from a build, and no shard is there that the index does not name."""
    named = {shard.path for shard in shards}
    if (root / "work").exists():
        findings.add("work", "a build of this root has not ended", "repeat the command of the build")
    for folder in (root, *(root / name for name in ("index", "ledger", *MEMBERS))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.relative_to(root).as_posix()
            if path.suffix == ".tmp":
                findings.add(name, "was not finished by what wrote it", "remove it, unless that still runs")
            elif path.suffix == ".tar" and path not in named:
                findings.add(name, "is no shard of the index", REMOVE)
            elif path.name.endswith(".tar.idx") and path.with_suffix("") not in named:
                findings.add(name, "belongs to no shard of the index", REMOVE)


def check_reader_files(
    root: Path, folder: str, shards: Sequence[ShardToCheck], md5: Mapping[Path, str], findings: Findings
) -> None:
    """The files for Megatron-Energon and wids say what the index says of the ``shards`` of a folder.

    ``md5`` has the digest of each shard's file, empty where the shard is damaged. Which release of Energon they are for
    is not checked, because its own command writes another one.
    """
    names = {split: [shard.path.name for shard in shards if shard.split == split] for split in (*SPLITS, "test")}
    wanted: dict[str, dict[str, Any]] = {
        ".nv-meta/.info.json": {
            "energon_version": "",
            "shard_counts": {shard.path.name: shard.samples for shard in shards},
        },
        ".nv-meta/split.yaml": {"exclude": [], "split_parts": names},
        ".nv-meta/dataset.yaml": DATASET,
    }
    for split in SPLITS:
        if mine := [shard for shard in shards if shard.split == split]:
            listed = [
                {"url": shard.path.name, "nsamples": shard.samples, "filesize": shard.bytes, "md5sum": md5[shard.path]}
                for shard in mine
            ]
            head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"{folder}-{split}"}
            name = "shardindex.json" if split == "train" else f"shardindex-{split}.json"
            wanted[name] = head | {"shardlist": listed}
    for name, values in wanted.items():
        there = read_object(root, f"{folder}/{name}", findings)
        if there and not _agrees(there, values):
            odd = [field for field in sorted(values | there) if not _agrees(there.get(field), values.get(field))]
            findings.add(f"{folder}/{name}", f"{', '.join(odd)}: not what the index says")


def _agrees(there: Any, wanted: Any) -> bool:
    """Whether two JSON values are equal, where an empty text is wanted any text will do."""
    if isinstance(wanted, list) and isinstance(there, list):
        return len(there) == len(wanted) and all(map(_agrees, there, wanted))
    if isinstance(wanted, dict) and isinstance(there, dict):
        return there.keys() == wanted.keys() and all(_agrees(there[name], wanted[name]) for name in wanted)
    return type(there) is type(wanted) and (there == wanted or wanted == "")


# What was built and what was not ------------------------------------------------------------------------------------


def check_ledger(root: Path, findings: Findings) -> Counter[tuple[str, str, str]] | None:
    """Rows of the ledger by (entry, kind, reason); None, and a finding, if it cannot be read."""
    name = "ledger/ledger.parquet"
    counts: Counter[tuple[str, str, str]] = Counter()
    try:
        with pq.ParquetFile(root / name, page_checksum_verification=True) as file:
            if file.schema_arrow != LEDGER_SCHEMA:
                raise ValueError("has other columns than the format")
            for batch in file.iter_batches(batch_size=1 << 14):
                batch.validate(full=True)
                table = pa.Table.from_batches([batch])
                for row in table.group_by(["entry", "kind", "reason"]).aggregate([([], "count_all")]).to_pylist():
                    counts[row["entry"], row["kind"], row["reason"]] += row["count_all"]
        odd = [(kind, reason) for _, kind, reason in counts if kind not in KINDS or reason not in REASONS]
        if odd:
            raise ValueError(f"has a row of kind {odd[0][0]!r:.40} with reason {odd[0][1]!r:.40}")
        return counts
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        findings.add(name, f"cannot be read ({error})")
        return None


def check_counts(
    record: Mapping[str, Any], tables: Tables | None, ledger: Counter[tuple[str, str, str]] | None, findings: Findings
) -> None:
    """The counts of build.json are those of the index and the ledger, and every planned dialogue is in one of them."""
    for what in _wrong_counts(record, tables, ledger) if record else ():
        findings.add("build.json", what)


def _wrong_counts(
    record: Mapping[str, Any], tables: Tables | None, ledger: Counter[tuple[str, str, str]] | None
) -> Iterator[str]:
    entries = record.get("entries")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        yield "entries are not those of the format"
        return
    names = [entry["name"] for entry in entries]
    if len(set(names)) < len(names):
        yield "an entry is there twice"
    for entry in entries:
        lost = entry["planned"] - entry["dialogues"] - sum(entry["left_out"].get("dialogue", {}).values())
        if lost:
            yield f"entry {entry['name']}: {lost:,} planned dialogues are neither in the shards nor left out"
    if ledger is not None:
        stated = {
            (entry["name"], kind, reason): count
            for entry in entries
            for kind, reasons in entry["left_out"].items()
            for reason, count in reasons.items()
        }
        for entry, kind, reason in sorted(k for k in stated.keys() | ledger.keys() if stated.get(k) != ledger.get(k)):
            yield f"entry {entry}: left_out does not count the ledger's rows of {kind} {reason}"
    if tables is None:
        return
    counted = tables.dialogues["entry"].value_counts().to_pylist()
    written = {item["values"]: item["counts"] for item in counted}
    stated = {entry["name"]: entry["dialogues"] for entry in entries if entry["dialogues"]}
    for name in sorted(n for n in stated.keys() | written.keys() if stated.get(n) != written.get(n)):
        yield f"entry {name}: says {stated.get(name, 0):,} dialogues, the index has {written.get(name, 0):,}"
    frames = pc.sum(pc.list_value_length(tables.media["timestamps"])).as_py() or 0
    totals = {"media": len(tables.media), "frames": frames, "bytes": pc.sum(tables.media["size"]).as_py() or 0}
    for name, total in totals.items():
        if (said := sum(entry[name] for entry in entries)) != total:
            yield f"its entries have {said:,} {name}, the index {total:,}"
    if record.get("shards") != dict(Counter(tables.shards["folder"].to_pylist())):
        yield "shards does not count the shards of the index"


def _is_entry(entry: Any) -> bool:
    """Whether something has the fields of an entry in build.json."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    left_out = entry.get("left_out")
    if not isinstance(left_out, dict) or not all(isinstance(reasons, dict) for reasons in left_out.values()):
        return False
    counts = [entry.get(name) for name in COUNTS] + [n for reasons in left_out.values() for n in reasons.values()]
    return all(type(count) is int and count >= 0 for count in counts)
