"""The last steps of a build: number and move shards, write index, ledger, reader files and card, then build.json.

Everything here is derived from the plan, the results of its tasks and, for an addition, the previous tables of the
root. So it can be repeated from the start after a kill, and gives the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.shards.dataset_card import write_dataset_card
from framestream.pipeline.shards.index import SHARD_SCHEMA, build_table, index_digests, write_index
from framestream.pipeline.shards.ledger import LEDGER_FILE, write_ledger
from framestream.pipeline.shards.sidecars import read_sidecars, scan_shard, write_sidecars
from framestream.pipeline.shards.writer import ShardInfo
from framestream.pipeline.utils.atomic_io import file_sha256, fsync_path
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import write_record
from framestream.tools.builder.incremental import ExistingBuild, drop_rows
from framestream.tools.builder.task import OUTCOMES, PLAN_ROW, BuildJob, read_shard_info, task_folder
from framestream.tools.common.arrow_files import map_table, write_table
from framestream.tools.common.errors import BuildError, WorkerError

logger = logging.getLogger(__name__)

FOLDERS = ("video", "image", "dialogue")
SPLITS = ("train", "val")


def write_outcomes(job: BuildJob) -> None:
    """Write work/outcomes.arrow: for each media item of the plan its row in the index, or why it has none."""
    media = map_table(job.work / "plan" / "media.arrow", checked=True)
    rows, failed = media["built"].to_numpy().copy(), media["failed"].combine_chunks()
    count = len(_previous(job).media)
    keys: list[str] = []
    reasons: list[str] = []
    for folder in ("video", "image"):
        for _, name in _ordered_tasks(job, folder):
            built = map_table(task_folder(job.work, name) / "rows.arrow")[PLAN_ROW.name].to_numpy()
            rows[built] = np.arange(count, count + len(built))
            count += len(built)
            ledger = map_table(task_folder(job.work, name) / "ledger.arrow")
            ledger = ledger.filter(pc.equal(ledger["kind"], "media"))
            keys += ledger["key"].to_pylist()
            reasons += ledger["reason"].to_pylist()
    matches = pc.index_in(media["key"].combine_chunks(), pa.array(keys, pa.string()))
    reason = pc.if_else(pc.equal(failed, ""), pa.array(reasons, pa.string()).take(matches), failed)
    write_table(job.work / "outcomes.arrow", pa.table([pa.array(rows), reason], schema=OUTCOMES))


def finish(root: Path, job: BuildJob, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Do the last steps and return the contents of build.json.

    Raises:
        BuildError: the previous shards of the root are damaged.
        WorkerError: a dialogue of the plan is neither in a shard nor in the ledger, or a new shard is lost.
    """
    previous = _previous(job)
    shards = previous.shards.to_pylist()
    previous_infos = {
        folder: _previous_infos(root / folder, [shard for shard in shards if shard["folder"] == folder])
        for folder in FOLDERS
    }
    (root / "build.json").unlink(missing_ok=True)  # the root is unreadable from here to the end
    media_tables, dialogue_tables = [previous.media], [previous.dialogues]
    ledgers = [map_table(job.work / "plan" / "ledger.arrow", checked=True)]
    for folder, infos in previous_infos.items():
        numbers = Counter(info.split for info in infos)
        for _, name in _ordered_tasks(job, folder):
            results, split = task_folder(job.work, name), name.split("-")[1]
            ledgers.append(map_table(results / "ledger.arrow"))
            info = read_shard_info(results)
            if info is None:
                continue
            info = replace(info, name=f"{split}-{numbers[split]:06d}.tar")
            numbers[split] += 1
            _move(results / "shard.tar", root / folder / info.name, info)
            rows = map_table(results / "rows.arrow").drop_columns(PLAN_ROW.name)
            if folder == "dialogue":
                dialogue_tables.append(rows)
            else:
                shard = pa.array(np.full(len(rows), len(shards), dtype=np.int32))
                media_tables.append(rows.set_column(rows.schema.get_field_index("shard"), "shard", shard))
            shards.append(_shard_row(folder, split, info))
            infos.append(info)
        if infos:
            write_sidecars(root / folder, infos)
    media, dialogues, new_ledger = (pa.concat_tables(tables) for tables in (media_tables, dialogue_tables, ledgers))
    ledger = pa.concat_tables([_previous_ledger_rows(previous, job, new_ledger), new_ledger])
    shard_table = build_table(SHARD_SCHEMA, shards)
    fingerprint = write_index(root, media, dialogues, shard_table)
    write_ledger(root / LEDGER_FILE, ledger)
    record = {
        "index_fingerprint": fingerprint,
        "digests": {**index_digests(root), LEDGER_FILE: file_digest(root / LEDGER_FILE)},
        "specification": wanted,
        "entries": _count_entries(job, previous, media, dialogues, ledger),
        "shards": dict(Counter(shard["folder"] for shard in shards)),
    }
    write_dataset_card(root, record, shard_table, media)
    write_record(root / "build.json", record)
    return record


def _previous_infos(folder: Path, shards: Sequence[Mapping[str, Any]]) -> list[ShardInfo]:
    """Return the previous shards of a folder. What its files for other readers do not tell is read from the shards.

    Raises:
        BuildError: a shard is damaged.
    """
    try:
        known = {info.name: info for info in read_sidecars(folder)} if shards else {}
    except (OSError, ValueError) as error:
        logger.warning("%s; the shards of %s are read to make its files for other readers again", error, folder)
        known = {}
    infos = []
    for shard in shards:
        info = known.get(shard["name"])
        if not info or (info.samples, info.bytes) != (shard["samples"], shard["bytes"]):
            info = _scan(folder / shard["name"], shard)
        infos.append(replace(info, sha256=shard["sha256"]))
    return sorted(infos, key=lambda info: info.name)


def _scan(path: Path, shard: Mapping[str, Any]) -> ShardInfo:
    try:
        info = scan_shard(path)
        if all(getattr(info, name) == shard[name] for name in ("samples", "bytes", "sha256")):
            return info
        fault = "damaged (it is not the file of the index)"
    except (OSError, ValueError) as error:
        fault = " ".join(str(error).split())
    raise BuildError(f"{path}: {fault}; restore it from a copy, or remove the root and build it again")


def _previous(job: BuildJob) -> ExistingBuild:
    return ExistingBuild.open(job.work / "plan" / "previous", job.compat)


def _ordered_tasks(job: BuildJob, folder: str) -> list[tuple[int, str]]:
    """Return number and name of the tasks of a folder, in the order of their shards: by split, then as planned."""
    tasks = [(task, name) for task, name in enumerate(job.tasks) if name.startswith(f"{folder}-")]
    return sorted(tasks, key=lambda task: (SPLITS.index(task[1].split("-")[1]), task[0]))


def _move(path: Path, target: Path, info: ShardInfo) -> None:
    """Move a shard to ``target``, unless an interrupted run has already done so.

    Raises:
        WorkerError: it is in neither place.
    """
    if path.is_file():
        target.parent.mkdir(exist_ok=True)
        os.replace(path, target)
        fsync_path(target.parent)
    elif not target.is_file() or file_sha256(target).hex() != info.sha256:
        raise WorkerError(f"{target}: lost; remove {target.parent.parent} and build it again")


def _shard_row(folder: str, split: str, info: ShardInfo) -> dict[str, Any]:
    facts = {"samples": info.samples, "bytes": info.bytes, "sha256": info.sha256}
    return {"folder": folder, "split": split, "name": info.name, **facts}


def _previous_ledger_rows(previous: ExistingBuild, job: BuildJob, new_ledger: pa.Table) -> pa.Table:
    """Return the rows of the previous ledger, without those about something that was planned again."""
    plan = job.work / "plan"
    media = map_table(plan / "media.arrow", checked=True)
    keys = [
        media.filter(pc.greater_equal(media["task"], 0))["key"],
        map_table(plan / "dialogues.arrow", checked=True)["key"],
        new_ledger["key"],
    ]
    replanned = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.string())
    return drop_rows(previous.ledger, replanned, set(_read_tasks(job)["samples"]))


def _read_tasks(job: BuildJob) -> dict[str, Any]:
    return json.loads((job.work / "plan" / "tasks.json").read_bytes())


def _count_entries(
    job: BuildJob, previous: ExistingBuild, media: pa.Table, dialogues: pa.Table, ledger: pa.Table
) -> list[dict[str, Any]]:
    """Count what was built and left out for each entry, in plan order.

    Raises:
        WorkerError: a planned dialogue is neither in a shard nor in the ledger.
    """
    new_counts = _count_new_media(job, media)
    written = {item["values"]: item["counts"] for item in dialogues["entry"].value_counts().to_pylist()}
    left_out_counts = _count_left_out(ledger)
    previous_entries = {entry["name"]: entry for entry in previous.record.get("entries", [])}
    samples = _read_tasks(job)["samples"]
    entries = []
    for number, name in enumerate(job.entries):
        left_out, old = left_out_counts.get(name, {}), previous_entries.get(name, {})
        planned = old.get("planned") or samples.get(name, 0)
        done = written.get(name, 0) + sum(left_out.get("dialogue", {}).values())
        if done != planned:
            raise WorkerError(f"entry {name}: {planned} dialogues were planned, {done} are in the shards or the ledger")
        counts = {key: values[number] + old.get(key, 0) for key, values in new_counts.items()}
        entries.append(
            {"name": name, "planned": planned, "dialogues": written.get(name, 0), **counts, "left_out": left_out}
        )
    return entries


def _count_new_media(job: BuildJob, media: pa.Table) -> dict[str, list[int]]:
    """Count the media, frames and bytes that this build added, each as a list by entry number."""
    rows = map_table(job.work / "outcomes.arrow", checked=True)["row"].to_numpy()
    plan = map_table(job.work / "plan" / "media.arrow", checked=True)
    is_new = (rows >= 0) & (plan["task"].to_numpy() >= 0)
    entry, row = plan["entry"].to_numpy()[is_new], rows[is_new]
    frames = pc.list_value_length(media["timestamps"]).to_numpy()[row]
    sizes = media["size"].to_numpy()[row]
    return {
        name: np.bincount(entry, weights=weights, minlength=len(job.entries)).astype(np.int64).tolist()
        for name, weights in (("media", None), ("frames", frames), ("bytes", sizes))
    }


def _count_left_out(ledger: pa.Table) -> dict[str, dict[str, dict[str, int]]]:
    """Count the rows of a ledger by entry, kind and reason, in sorted order."""
    groups = ledger.group_by(["entry", "kind", "reason"]).aggregate([([], "count_all")]).to_pylist()
    counts: dict[str, dict[str, dict[str, int]]] = {}
    for group in sorted(groups, key=lambda group: (group["entry"], group["kind"], group["reason"])):
        kinds = counts.setdefault(group["entry"], {})
        kinds.setdefault(group["kind"], {})[group["reason"]] = group["count_all"]
    return counts
