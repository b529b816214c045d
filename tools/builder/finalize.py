"""The last steps of a build: shards numbered and moved, index, ledger, reader files, and at the very end build.json.

Everything here is derived from the plan, the results of its tasks and, for an addition, the tables of the root as it
was. So it can be done again from its start after a kill, and gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.shards.index import SHARD_SCHEMA, build_table, write_index
from framestream.pipeline.shards.ledger import write_ledger
from framestream.pipeline.shards.sidecars import read_sidecars, write_sidecars
from framestream.pipeline.shards.writer import ShardInfo
from framestream.pipeline.utils.atomic_io import fsync_path, write_atomic
from framestream.tools.builder.incremental import ExistingBuild, drop_rows
from framestream.tools.builder.task import OUTCOMES, PLAN_ROW, BuildJob, read_shard_info, task_folder
from framestream.tools.common.arrow_files import map_table, write_table
from framestream.tools.common.errors import WorkerError

FOLDERS = ("video", "image", "dialogue")
SPLITS = ("train", "val")


def write_outcomes(job: BuildJob) -> None:
    """For each media item of the plan its row in the index, or why it has none, into work/outcomes.arrow."""
    media = map_table(job.work / "plan" / "media.arrow")
    rows, failed = media["built"].to_numpy().copy(), media["failed"].combine_chunks()
    count = len(_previous(job).media)
    keys, reasons = [], []
    for folder in ("video", "image"):
        for _, name in _ordered(job, folder):
            built = map_table(task_folder(job.work, name) / "rows.arrow")[PLAN_ROW.name].to_numpy()
            rows[built] = np.arange(count, count + len(built))
            count += len(built)
            ledger = map_table(task_folder(job.work, name) / "ledger.arrow")
            ledger = ledger.filter(pc.equal(ledger["kind"], "media"))
            keys += ledger["key"].to_pylist()
            reasons += ledger["reason"].to_pylist()
    place = pc.index_in(media["key"].combine_chunks(), pa.array(keys, pa.string()))
    reason = pc.if_else(pc.equal(failed, ""), pa.array(reasons, pa.string()).take(place), failed)
    write_table(job.work / "outcomes.arrow", pa.table([pa.array(rows), reason], schema=OUTCOMES))


def finish(root: Path, job: BuildJob, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Take the last steps; returns the contents of build.json.

    Raises:
        WorkError: a dialogue of the plan is neither in a shard nor in the ledger.
    """
    previous = _previous(job)
    (root / "build.json").unlink(missing_ok=True)  # from here to the end the root is not one that can be read
    shards = previous.shards.to_pylist()
    tables = {"media": [previous.media], "dialogues": [previous.dialogues]}
    new = {"media": [], "dialogues": []}
    ledgers = [map_table(job.work / "plan" / "ledger.arrow")]
    for folder in FOLDERS:
        kept = {shard["name"]: shard["sha256"] for shard in shards if shard["folder"] == folder}
        infos = [replace(i, sha256=kept[i.name]) for i in read_sidecars(root / folder) if i.name in kept]
        numbers = Counter(info.split for info in infos)
        for _, name in _ordered(job, folder):
            results, split = task_folder(job.work, name), name.split("-")[1]
            ledgers.append(map_table(results / "ledger.arrow"))
            info = read_shard_info(results)
            if info is None:
                continue
            info = replace(info, name=f"{split}-{numbers[split]:06d}.tar")
            numbers[split] += 1
            _move(results / "shard.tar", root / folder / info.name)
            rows = map_table(results / "rows.arrow").drop_columns(PLAN_ROW.name)
            if folder == "dialogue":
                new["dialogues"].append(rows)
            else:
                shard = pa.array(np.full(len(rows), len(shards), dtype=np.int32))
                new["media"].append(rows.set_column(rows.schema.get_field_index("shard"), "shard", shard))
            shards.append(_shard_row(folder, split, info))
            infos.append(info)
        if infos:
            write_sidecars(root / folder, infos)
    media, dialogues = (pa.concat_tables([*tables[name], *new[name]]) for name in ("media", "dialogues"))
    fresh = pa.concat_tables(ledgers)
    ledger = pa.concat_tables([_kept(previous, job, fresh), fresh])
    fingerprint = write_index(root, media, dialogues, build_table(SHARD_SCHEMA, shards))
    write_ledger(root / "ledger" / "ledger.parquet", ledger)
    record = {
        "index_fingerprint": fingerprint,
        "specification": wanted,
        "entries": _count(job, previous, media, dialogues, ledger),
        "shards": dict(Counter(shard["folder"] for shard in shards)),
    }
    write_atomic(root / "build.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return record


def _previous(job: BuildJob) -> ExistingBuild:
    return ExistingBuild.open(job.work / "plan" / "previous", job.compat)


def _ordered(job: BuildJob, folder: str) -> list[tuple[int, str]]:
    """Number and name of the tasks of a folder, in the order of their shards: by split, then as planned."""
    tasks = [(task, name) for task, name in enumerate(job.tasks) if name.startswith(f"{folder}-")]
    return sorted(tasks, key=lambda task: (SPLITS.index(task[1].split("-")[1]), task[0]))


def _move(path: Path, place: Path) -> None:
    """Move a shard to its place, unless an interrupted run did already."""
    if path.is_file():
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
        fsync_path(place.parent)


def _shard_row(folder: str, split: str, info: ShardInfo) -> dict[str, Any]:
    facts = {"samples": info.samples, "bytes": info.bytes, "sha256": info.sha256}
    return {"folder": folder, "split": split, "name": info.name, **facts}


def _kept(previous: ExistingBuild, job: BuildJob, fresh: pa.Table) -> pa.Table:
    """The rows of the ledger before that are not about something planned again."""
    plan = job.work / "plan"
    media = map_table(plan / "media.arrow")
    keys = [
        media.filter(pc.greater_equal(media["task"], 0))["key"],
        map_table(plan / "dialogues.arrow")["key"],
        fresh["key"],
    ]
    again = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.string())
    return drop_rows(previous.ledger, again, set(_tasks(job)["samples"]))


def _tasks(job: BuildJob) -> dict[str, Any]:
    return json.loads((job.work / "plan" / "tasks.json").read_bytes())


def _count(
    job: BuildJob, previous: ExistingBuild, media: pa.Table, dialogues: pa.Table, ledger: pa.Table
) -> list[dict[str, Any]]:
    """Per entry, in plan order: what was built and what was left out; checks that no dialogue was lost on the way."""
    outcomes = map_table(job.work / "outcomes.arrow")["row"].to_numpy()
    plan = map_table(job.work / "plan" / "media.arrow")
    new = (outcomes >= 0) & (plan["task"].to_numpy() >= 0)
    entry, row = plan["entry"].to_numpy()[new], outcomes[new]
    lengths = pc.list_value_length(media["timestamps"]).to_numpy()[row]
    sizes = media["size"].to_numpy()[row]
    built = {
        name: np.bincount(entry, weights=weights, minlength=len(job.entries)).astype(np.int64).tolist()
        for name, weights in (("media", None), ("frames", lengths), ("bytes", sizes))
    }
    written = {item["values"]: item["counts"] for item in dialogues["entry"].value_counts().to_pylist()}
    groups = ledger.group_by(["entry", "kind", "reason"]).aggregate([([], "count_all")]).to_pylist()
    before = {entry["name"]: entry for entry in previous.record.get("entries", [])}
    samples = _tasks(job)["samples"]
    counts = []
    for number, name in enumerate(job.entries):
        mine = sorted((g["kind"], g["reason"], g["count_all"]) for g in groups if g["entry"] == name)
        left_out = {kind: {reason: n for k, reason, n in mine if k == kind} for kind in sorted({k for k, _, _ in mine})}
        old = before.get(name, {})
        planned = old.get("planned") or samples.get(name, 0)
        done = written.get(name, 0) + sum(left_out.get("dialogue", {}).values())
        if done != planned:
            raise WorkerError(f"entry {name}: {planned} dialogues were planned, {done} are in the shards or the ledger")
        facts = {key: values[number] + old.get(key, 0) for key, values in built.items()}
        counts.append(
            {"name": name, "planned": planned, "dialogues": written.get(name, 0), **facts, "left_out": left_out}
        )
    return counts
