"""Check a shard root against docs/format.md: first the index, then every shard.

Worker processes read each shard once, front to end. A process holds one sample and one batch of index rows in memory,
whatever the size of the root.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from framestream.tools.verify.findings import Findings
from framestream.tools.verify.index import IndexTables, check_index
from framestream.tools.verify.shard import MEMBERS, ShardChecker, ShardResult, ShardToCheck
from framestream.tools.verify.sidecars import (
    check_counts,
    check_digests,
    check_ledger,
    check_leftovers,
    check_reader_files,
    read_object,
)


class VerifyError(ValueError):
    """A root cannot be verified at all. The message names the folder and the fix in one line."""


@dataclass(slots=True)
class VerifyResult:
    """Findings of a verification, and totals of what was read."""

    findings: Findings
    shards: int = 0
    samples: int = 0
    frames: int = 0
    bytes: int = 0


def verify(root: Path, deep: bool, workers: int, max_listed: int) -> VerifyResult:
    """Check the finished root ``root``.

    Args:
        deep: also decode every frame.
        workers: processes that read shards.
        max_listed: findings to list; all are counted.

    Raises:
        VerifyError: ``root`` is not a finished build, or a process died.
    """
    if not (root / "build.json").exists():
        raise VerifyError(f"{root}: no finished shards here (no build.json); name a folder such as shards/stage3")
    result = VerifyResult(Findings(max_listed))
    findings = result.findings
    record = read_object(root, "build.json", findings)
    if "digests" in record and record.get("digest") != _record_digest(record):
        findings.add("build.json", "its digest is not that of its other fields")
    tables = check_index(root, record, findings)
    check_counts(record, tables, check_ledger(root, findings), findings)
    check_digests(root, record, tables is not None, findings)
    shards = _shards_on_disk(root) if tables is None else tables.list_shards(root)
    check_leftovers(root, shards, findings)
    md5: dict[Path, str] = {}
    total = sum(shard.path.stat().st_size for shard in shards if shard.path.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="shards", disable=None, dynamic_ncols=True) as bar:
        for shard, checked in zip(shards, _check_all(root, shards, tables, deep, workers, max_listed), strict=True):
            findings.extend(checked.findings)
            md5[shard.path] = checked.md5
            result.shards += 1
            result.samples += checked.samples
            result.frames += checked.frames
            result.bytes += checked.bytes
            seconds = bar.format_dict["elapsed"] or 1
            rates = f"{result.samples / seconds:.0f} samples/s, {result.frames / seconds:.0f} frames/s"
            bar.set_postfix_str(f"{rates}, {findings.count} findings", refresh=False)
            bar.update(checked.bytes)
    for folder in MEMBERS if tables else ():
        if folder_shards := [shard for shard in shards if shard.folder == folder]:
            check_reader_files(root, folder, folder_shards, md5, findings)
    return result


def _record_digest(record: Mapping[str, Any]) -> str:
    """Return the digest that the other fields of build.json must have, as docs/format.md defines it."""
    fields = {name: value for name, value in record.items() if name != "digest"}
    return xxhash.xxh3_64_hexdigest(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode())


def _shards_on_disk(root: Path) -> list[ShardToCheck]:
    """List the shards on disk, for a root without a valid index."""
    paths = [path for folder in MEMBERS for path in sorted((root / folder).glob("*.tar"))]
    return [ShardToCheck(path, path.parent.name, path.name.rpartition("-")[0]) for path in paths]


def _check_all(
    root: Path, shards: Sequence[ShardToCheck], tables: IndexTables | None, deep: bool, workers: int, max_listed: int
) -> Iterator[ShardResult]:
    """Check all shards. Yields their results in the order of ``shards``."""
    if workers == 1 or len(shards) < 2:
        yield from map(_make_checker(tables, deep, max_listed).check, shards)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (root, tables is not None, deep, max_listed)
    with ProcessPoolExecutor(min(workers, len(shards)), context, _init_worker, arguments) as pool:
        try:
            yield from pool.map(_check_shard, shards)
        except BrokenProcessPool:
            raise VerifyError(f"{root}: a process that read shards died; try again with --workers 1") from None


def _make_checker(tables: IndexTables | None, deep: bool, max_listed: int) -> ShardChecker:
    media, dialogues = (tables.media, tables.dialogues) if tables else (None, None)
    return ShardChecker(media, dialogues, deep, max_listed)


_checker: ShardChecker  # of this worker process


def _init_worker(root: Path, has_index: bool, deep: bool, max_listed: int) -> None:
    """Prepare a worker process. Its tables are memory maps of files that the parent has checked."""
    global _checker
    _checker = _make_checker(IndexTables.map(root) if has_index else None, deep, max_listed)


def _check_shard(shard: ShardToCheck) -> ShardResult:
    return _checker.check(shard)
