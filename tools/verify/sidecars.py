"""Check the files beside the shards of a root: build.json, the ledger, files for other readers, and leftovers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from framestream.pipeline.shards.index import FILES
from framestream.pipeline.shards.ledger import KINDS, LEDGER_FILE, REASONS
from framestream.pipeline.shards.ledger import SCHEMA as LEDGER_SCHEMA
from framestream.pipeline.utils.yaml_parser import parse_yaml
from framestream.tools.verify.findings import Findings
from framestream.tools.verify.index import SPLITS, IndexTables
from framestream.tools.verify.shard import MEMBERS, ShardToCheck
from framestream.tools.verify.tar import CHUNK

MAX_TEXT = 1 << 28  #: bytes of a JSON or YAML file that is parsed
REMOVE = "remove it"
COUNTS = ("planned", "dialogues", "media", "frames", "bytes")  #: of an entry in build.json
DATASET = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}

LedgerCounts: TypeAlias = Counter[tuple[str, str, str]]  # rows by entry, kind and reason
Key = TypeVar("Key", str, tuple[str, str, str])


def read_object(root: Path, name: str, findings: Findings) -> dict[str, Any]:
    """Read the object in a JSON or YAML file of ``root``. Return an empty one, and add a finding, on errors."""
    kind, path = ("YAML" if name.endswith(".yaml") else "JSON"), root / name
    try:
        if path.stat().st_size > MAX_TEXT:
            raise ValueError("file too large")
        text = path.read_text(encoding="utf-8")
        value = parse_yaml(text, max_bytes=MAX_TEXT) if kind == "YAML" else json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value
    except OSError as error:
        findings.add(name, f"cannot be read ({error.strerror})")
    except (ValueError, RecursionError) as error:
        findings.add(name, f"is not a valid {kind} file ({str(error) or 'nested too deeply'})")
    return {}


def check_leftovers(root: Path, shards: Sequence[ShardToCheck], findings: Findings) -> None:
    """Find files of an unfinished build, and shards that the index does not name."""
    indexed = {shard.path for shard in shards}
    if (root / "work").exists():
        findings.add("work", "a build of this root is not finished", "run its build command again")
    for folder in (root, *(root / name for name in ("index", "ledger", *MEMBERS))):
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            name = path.relative_to(root).as_posix()
            if path.suffix == ".tmp":
                findings.add(name, "is an unfinished temporary file", "remove it, unless a build is still running")
            elif path.suffix == ".tar" and path not in indexed:
                findings.add(name, "is not a shard of the index", REMOVE)
            elif path.name.endswith(".tar.idx") and path.with_suffix("") not in indexed:
                findings.add(name, "belongs to no shard of the index", REMOVE)


def check_reader_files(
    root: Path, folder: str, shards: Sequence[ShardToCheck], md5: Mapping[Path, str], findings: Findings
) -> None:
    """Compare the files for Megatron-Energon and wids with the index, for the ``shards`` of a folder.

    ``md5`` has the digest of each shard's file, which is empty if the shard is damaged. The release of Energon is not
    checked, because Energon's own command writes a different one.
    """
    names = {split: [shard.path.name for shard in shards if shard.split == split] for split in (*SPLITS, "test")}
    expected: dict[str, dict[str, Any]] = {
        ".nv-meta/.info.json": {
            "energon_version": "",
            "shard_counts": {shard.path.name: shard.samples for shard in shards},
        },
        ".nv-meta/split.yaml": {"exclude": [], "split_parts": names},
        ".nv-meta/dataset.yaml": DATASET,
    }
    for split in SPLITS:
        if split_shards := [shard for shard in shards if shard.split == split]:
            shard_list = [
                {"url": shard.path.name, "nsamples": shard.samples, "filesize": shard.bytes, "md5sum": md5[shard.path]}
                for shard in split_shards
            ]
            head = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"{folder}-{split}"}
            name = "shardindex.json" if split == "train" else f"shardindex-{split}.json"
            expected[name] = head | {"shardlist": shard_list}
    for name, values in expected.items():
        actual = read_object(root, f"{folder}/{name}", findings)
        if actual and not _matches(actual, values):
            wrong = [field for field in sorted(values | actual) if not _matches(actual.get(field), values.get(field))]
            findings.add(f"{folder}/{name}", f"{', '.join(wrong)}: not as in the index")


def _matches(actual: Any, expected: Any) -> bool:
    """Compare two JSON values. An empty text in ``expected`` matches any text."""
    if isinstance(expected, list) and isinstance(actual, list):
        return len(actual) == len(expected) and all(map(_matches, actual, expected))
    if isinstance(expected, dict) and isinstance(actual, dict):
        return actual.keys() == expected.keys() and all(_matches(actual[name], expected[name]) for name in expected)
    return type(actual) is type(expected) and (actual == expected or expected == "")


# Build record and ledger --------------------------------------------------------------------------------------------


def check_ledger(root: Path, findings: Findings) -> LedgerCounts | None:
    """Count the rows of the ledger by (entry, kind, reason). Return None, and add a finding, if it cannot be read."""
    name = "ledger/ledger.parquet"
    counts: LedgerCounts = Counter()
    try:
        with pq.ParquetFile(root / name, page_checksum_verification=True) as file:
            if file.schema_arrow != LEDGER_SCHEMA:
                raise ValueError("does not have the columns of the format")
            for batch in file.iter_batches(batch_size=1 << 14):
                batch.validate(full=True)
                table = pa.Table.from_batches([batch])
                for row in table.group_by(["entry", "kind", "reason"]).aggregate([([], "count_all")]).to_pylist():
                    counts[row["entry"], row["kind"], row["reason"]] += row["count_all"]
        unknown = [(kind, reason) for _, kind, reason in counts if kind not in KINDS or reason not in REASONS]
        if unknown:
            raise ValueError(f"has a row of kind {unknown[0][0]!r:.40} with reason {unknown[0][1]!r:.40}")
        return counts
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        findings.add(name, f"cannot be read ({error})")
        return None


def check_digests(root: Path, record: Mapping[str, Any], has_index: bool, findings: Findings) -> None:
    """Compare the files that build.json has digests of: the ledger and, if it is sound, the index.

    Older roots have no digests.
    """
    digests = record.get("digests", {})
    if not isinstance(digests, dict):
        findings.add("build.json", "digests is not an object")
        return
    known = {f"index/{name}.arrow" for name in FILES} | {LEDGER_FILE}
    for name, digest in digests.items():
        if name not in known:
            findings.add("build.json", f"digests names {name!r:.60}, which is no file of the format")
        elif (has_index or name == LEDGER_FILE) and (root / name).is_file() and _digest(root / name) != digest:
            findings.add(name, "its digest is not the one in build.json")


def _digest(path: Path) -> str:
    """Return the digest of a file as docs/format.md defines it."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while data := file.read(CHUNK):
            digest.update(data)
    return digest.hexdigest()


def check_counts(
    record: Mapping[str, Any], tables: IndexTables | None, ledger: LedgerCounts | None, findings: Findings
) -> None:
    """Compare the counts of build.json with the index and the ledger.

    Every planned dialogue must be in one of the two. What cannot be read (None, or an empty ``record``) is skipped.
    """
    if not record:
        return
    entries = record.get("entries")
    if not isinstance(entries, list) or not all(map(_is_entry, entries)):
        findings.add("build.json", "its entries are not in the format")
        return
    problems = _entry_problems(entries)
    if ledger is not None:
        problems += _ledger_problems(entries, ledger)
    if tables is not None:
        problems += _dialogue_problems(entries, tables) + _total_problems(entries, tables)
        if record.get("shards") != dict(Counter(tables.shards["folder"].to_pylist())):
            problems.append("shards does not count the shards of the index")
    for problem in problems:
        findings.add("build.json", problem)


def _entry_problems(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Check that names are unique, and that each entry's dialogues add up."""
    problems = ["two entries have the same name"] if len({entry["name"] for entry in entries}) < len(entries) else []
    for entry in entries:
        missing = entry["planned"] - entry["dialogues"] - sum(entry["left_out"].get("dialogue", {}).values())
        if missing:
            problems.append(f"entry {entry['name']}: {missing:,} planned dialogues are neither built nor left out")
    return problems


def _ledger_problems(entries: Sequence[Mapping[str, Any]], ledger: LedgerCounts) -> list[str]:
    """Compare ``left_out`` of the entries with the rows of the ledger."""
    stated = {
        (entry["name"], kind, reason): count
        for entry in entries
        for kind, reasons in entry["left_out"].items()
        for reason, count in reasons.items()
    }
    return [
        f"entry {entry}: left_out does not count the ledger's rows of {kind} {reason}"
        for entry, kind, reason in _differing_keys(stated, ledger)
    ]


def _dialogue_problems(entries: Sequence[Mapping[str, Any]], tables: IndexTables) -> list[str]:
    """Compare the entries' dialogues with the rows of the index."""
    counts = tables.dialogues["entry"].value_counts().to_pylist()
    indexed = {item["values"]: item["counts"] for item in counts}
    stated = {entry["name"]: entry["dialogues"] for entry in entries if entry["dialogues"]}
    return [
        f"entry {name}: says {stated.get(name, 0):,} dialogues, the index has {indexed.get(name, 0):,}"
        for name in _differing_keys(stated, indexed)
    ]


def _total_problems(entries: Sequence[Mapping[str, Any]], tables: IndexTables) -> list[str]:
    """Compare media, frames and bytes, summed over the entries, with the index."""
    media = tables.media
    frames = pc.sum(pc.list_value_length(media["timestamps"])).as_py() or 0
    totals = {"media": len(media), "frames": frames, "bytes": pc.sum(media["size"]).as_py() or 0}
    sums = {name: sum(entry[name] for entry in entries) for name in totals}
    return [
        f"its entries have {sums[name]:,} {name}, the index {totals[name]:,}"
        for name in totals
        if sums[name] != totals[name]
    ]


def _differing_keys(one: Mapping[Key, int], other: Mapping[Key, int]) -> list[Key]:
    """Return, sorted, the keys that do not have the same value in both mappings."""
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))


def _is_entry(entry: Any) -> bool:
    """Return whether ``entry`` has the fields of an entry in build.json."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        return False
    left_out = entry.get("left_out")
    if not isinstance(left_out, dict) or not all(isinstance(reasons, dict) for reasons in left_out.values()):
        return False
    counts = [entry.get(name) for name in COUNTS] + [n for reasons in left_out.values() for n in reasons.values()]
    return all(type(count) is int and count >= 0 for count in counts)
