"""A shard root against docs/format.md: the index first, then every shard read once, front to end, by processes.

Memory is bounded by one sample and a batch of index rows in each process, whatever the size of the root.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from framestream.tools.verify.findings import Findings
from framestream.tools.verify.index import Tables, check_index
from framestream.tools.verify.shard import MEMBERS, ShardCheck, ShardResult, ShardToCheck
from framestream.tools.verify.sidecars import (
    check_counts,
    check_ledger,
    check_leftovers,
    check_reader_files,
    read_object,
)


class VerifyError(ValueError):
    """A root cannot be verified at all: one line that names the folder and the fix."""


@dataclass(slots=True)
class VerifyResult:
    """What a verification came to."""

    findings: Findings
    shards: int = 0
    samples: int = 0
    frames: int = 0
    bytes: int = 0


def verify(root: Path, deep: bool, workers: int, most: int) -> VerifyResult:
    """Check the finished root ``root``.

    Args:
        deep: decode every frame, too.
        workers: processes that read shards.
        most: findings that are kept; all are counted.

    Raises:
        VerifyError: no finished root is there, or a process died.
    """
    if not (root / "build.json").exists():
        raise VerifyError(f"{root}: no finished shards here (no build.json); name a folder such as shards/stage3")
    outcome = VerifyResult(Findings(most))
    findings = outcome.findings
    record = read_object(root, "build.json", findings)
    tables = check_index(root, record, findings)
    check_counts(record, tables, check_ledger(root, findings), findings)
    shards = _unlisted(root) if tables is None else tables.list_shards(root)
    check_leftovers(root, shards, findings)
    md5: dict[Path, str] = {}
    total = sum(shard.path.stat().st_size for shard in shards if shard.path.is_file())
    with tqdm(total=total, unit="B", unit_scale=True, desc="shards", disable=None, dynamic_ncols=True) as bar:
        for shard, checked in zip(shards, _check_all(root, shards, tables, deep, workers, most), strict=True):
            findings.extend(checked.findings)
            md5[shard.path] = checked.md5
            outcome.shards += 1
            outcome.samples += checked.samples
            outcome.frames += checked.frames
            outcome.bytes += checked.bytes
            seconds = bar.format_dict["elapsed"] or 1
            rates = f"{outcome.samples / seconds:.0f} samples/s, {outcome.frames / seconds:.0f} frames/s"
            bar.set_postfix_str(f"{rates}, {findings.count} findings", refresh=False)
            bar.update(checked.bytes)
    for folder in MEMBERS if tables else ():
        if there := [shard for shard in shards if shard.folder == folder]:
            check_reader_files(root, folder, there, md5, findings)
    return outcome


def _unlisted(root: Path) -> list[ShardToCheck]:
    """The shards that are there, where no index says which there should be."""
    paths = [path for folder in MEMBERS for path in sorted((root / folder).glob("*.tar"))]
    return [ShardToCheck(path, path.parent.name, path.name.rpartition("-")[0]) for path in paths]


def _check_all(
    root: Path, shards: Sequence[ShardToCheck], tables: Tables | None, deep: bool, workers: int, most: int
) -> Iterator[ShardResult]:
    """The results in the order of ``shards``."""
    if workers == 1 or len(shards) < 2:
        yield from map(_shard_check(tables, deep, most).check, shards)
        return
    context = multiprocessing.get_context("spawn")
    arguments = (root, tables is not None, deep, most)
    with ProcessPoolExecutor(min(workers, len(shards)), context, _start, arguments) as pool:
        try:
            yield from pool.map(_check, shards)
        except BrokenProcessPool:
            raise VerifyError(f"{root}: a process that read shards died; try again with --workers 1") from None


def _shard_check(tables: Tables | None, deep: bool, most: int) -> ShardCheck:
    return ShardCheck(tables and tables.media, tables and tables.dialogues, deep, most)


def _start(root: Path, known: bool, deep: bool, most: int) -> None:
    """Prepare a process; its tables are memory maps of files that were checked before."""
    global _checker
    _checker = _shard_check(Tables.map(root) if known else None, deep, most)


def _check(shard: ShardToCheck) -> ShardResult:
    return _checker.check(shard)
