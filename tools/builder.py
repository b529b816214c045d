"""From a manifest to a finished shard root, through interruptions.

The work folder of an unfinished root holds the plan and the results of every finished task, each of which appears
whole. So the same command after a kill goes on where it was, and the last steps (numbering, index, ledger, reader
files, ``build.json``) only move and derive: doing them twice gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from pipeline.annotations import AnnotationFileError
from pipeline.files import sync_folder, write_atomic
from pipeline.index import DIALOGUE_SCHEMA, SHARD_SCHEMA, media_schema, table, write_index
from pipeline.ledger import SCHEMA as LEDGER_SCHEMA
from pipeline.ledger import write_ledger
from pipeline.manifest import Manifest
from pipeline.shard_format import ShardInfo, json_text, write_reader_files
from tools.plan import make_plan
from tools.pool import Pool
from tools.roots import BuildError, Origin, WorkError, origins
from tools.specification import difference, specification
from tools.tables import map_table, write_table
from tools.tasks import OUTCOMES, PLAN_ROW, Job, is_dialogue, make_worker, read_shard_info, task_folder

FOLDERS = ("video", "image", "dialogue")
SPLITS = ("train", "val")


def build(
    manifest: Manifest, workers: int, limit: int | None = None, skip_unresolved: bool = False
) -> tuple[dict[str, Any], bool]:
    """Build ``manifest.shard_root``; returns the contents of its build.json and whether it was finished before.

    Raises:
        BuildError: something the plan needs is not here, no dialogue can be used, or the folder holds another build.
        WorkError: a worker failed.
        AnnotationFileError: an annotation file is broken.
    """
    root = manifest.shard_root
    found = origins(manifest)
    wanted = specification(manifest, found, limit)
    with _root_folder(root):
        work, finished = root / "work", root / "build.json"
        if finished.is_file():
            record = json.loads(finished.read_bytes())
            _check_same(root, record["specification"], wanted, found)
            shutil.rmtree(work, ignore_errors=True)
            return record, True
        _plan(manifest, found, wanted, work, limit, strict=not skip_unresolved)
        names = tuple(json.loads((work / "plan" / "tasks.json").read_bytes())["tasks"])
        job = Job(
            work=work,
            tasks=names,
            entries=tuple(origin.entry.name for origin in found),
            roots=tuple(origin.media.path for origin in found),
            frames=manifest.frames,
            images=manifest.images,
            seed=manifest.seed,
            compat=manifest.compat,
        )
        _run(job, workers, manifest.data.decode_timeout)
        record = _finish(root, job, wanted)
        shutil.rmtree(work)
        return record, False


@contextlib.contextmanager
def _root_folder(root: Path) -> Iterator[None]:
    """Hold ``root``, created where missing, against other builds; folders that stay empty are removed."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{root}: cannot be made ({error.strerror}); give another --out") from None
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise BuildError(f"{root}: another build is at work here; wait for it, or stop it") from None
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty
            for folder in missing:
                folder.rmdir()


def _check_same(root: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], found: list[Origin]) -> None:
    if other := difference(there, wanted, found):
        fix = f"give another --out, remove {root}, or undo the difference"
        raise BuildError(f"{root}: holds another build: {other}; {fix}")


def _plan(
    manifest: Manifest, found: list[Origin], wanted: dict[str, Any], work: Path, limit: int | None, strict: bool
) -> None:
    """Make work/plan unless it is there; it appears whole."""
    folder, scratch = work / "plan", work / "plan.tmp"
    if folder.is_dir():
        _check_same(work.parent, json.loads((folder / "specification.json").read_bytes()), wanted, found)
        return
    if strange := [path.name for path in sorted(work.parent.iterdir()) if path != work]:
        raise BuildError(f"{work.parent}: holds {strange[0]}, which no build left here; give another --out")
    shutil.rmtree(work, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        make_plan(manifest, found, scratch, limit, strict)
    except (BuildError, AnnotationFileError):
        shutil.rmtree(work)
        raise
    write_atomic(scratch / "specification.json", json_text(wanted).encode())
    os.rename(scratch, folder)
    sync_folder(work)


def _run(job: Job, workers: int, limit: float) -> None:
    """Run all tasks that are not finished: first media, then, when their outcomes are known, dialogues."""
    (job.work / "tasks").mkdir(exist_ok=True)
    for scratch in (job.work / "tasks").glob("*.tmp"):
        shutil.rmtree(scratch, ignore_errors=True)
    media = map_table(job.work / "plan" / "media.arrow")
    left = [task for task, name in enumerate(job.tasks) if not task_folder(job.work, name).is_dir()]
    dialogues = [task for task in left if is_dialogue(job.tasks[task])]
    left = [task for task in left if not is_dialogue(job.tasks[task])]
    sizes = np.bincount(media["task"].to_numpy(), minlength=len(job.tasks))
    done, frames = len(media) - int(sizes[left].sum()), 0
    with Pool(make_worker, (job,), workers, limit) as pool:
        with tqdm(total=len(media), initial=done, unit=" media", desc="media", disable=None) as bar:
            for counts in pool.run(left):
                frames += counts.get("frames", 0)
                bar.update(counts.get("media", 0))
                if elapsed := bar.format_dict["elapsed"]:
                    bar.set_postfix_str(f"{frames / elapsed:.0f} frames/s", refresh=False)
        write_table(job.work / "outcomes.arrow", _outcomes(job, media))
        for _ in pool.run(dialogues):
            pass


def _ordered(job: Job, folder: str) -> list[tuple[int, str]]:
    """Number and name of the tasks of a folder, in the order of their shards: by split, then as planned."""
    tasks = [(task, name) for task, name in enumerate(job.tasks) if name.startswith(f"{folder}-")]
    return sorted(tasks, key=lambda task: (SPLITS.index(task[1].split("-")[1]), task[0]))


def _outcomes(job: Job, media: pa.Table) -> pa.Table:
    """For each media item of the plan its row in the index, or why it has none."""
    rows, keys, reasons = np.full(len(media), -1, dtype=np.int32), [], []
    count = 0
    for folder in ("video", "image"):
        for _, name in _ordered(job, folder):
            built = map_table(task_folder(job.work, name) / "rows.arrow")[PLAN_ROW.name].to_numpy()
            rows[built] = np.arange(count, count + len(built))
            count += len(built)
            ledger = map_table(task_folder(job.work, name) / "ledger.arrow")
            ledger = ledger.filter(pc.equal(ledger["kind"], "media"))
            keys += ledger["key"].to_pylist()
            reasons += ledger["reason"].to_pylist()
    place = pc.index_in(media["key"], pa.array(keys, pa.string()))
    return pa.table([pa.array(rows), pa.array(reasons, pa.string()).take(place.combine_chunks())], schema=OUTCOMES)


# The last steps -------------------------------------------------------------------------------------------------------


def _finish(root: Path, job: Job, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Number and move the shards, write index, ledger and reader files, and last build.json."""
    shards: list[dict[str, Any]] = []
    tables: dict[str, list[pa.Table]] = {"media": [], "dialogues": []}
    ledgers = [map_table(job.work / "plan" / "ledger.arrow")]
    for folder in FOLDERS:
        infos, numbers = [], Counter()
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
                tables["dialogues"].append(rows)
            else:
                shard = pa.array(np.full(len(rows), len(shards), dtype=np.int32))
                tables["media"].append(rows.set_column(rows.schema.get_field_index("shard"), "shard", shard))
            shards.append(_shard_row(folder, split, info))
            infos.append(info)
        if infos:
            write_reader_files(root / folder, infos)
    media = pa.concat_tables([media_schema(job.compat).empty_table(), *tables["media"]])
    dialogues = pa.concat_tables([DIALOGUE_SCHEMA.empty_table(), *tables["dialogues"]])
    ledger = pa.concat_tables([LEDGER_SCHEMA.empty_table(), *ledgers])
    fingerprint = write_index(root, media, dialogues, table(SHARD_SCHEMA, shards))
    write_ledger(root / "ledger" / "ledger.parquet", ledger)
    record = {
        "index_fingerprint": fingerprint,
        "specification": wanted,
        "entries": _count(job, media, dialogues, ledger),
        "shards": dict(Counter(shard["folder"] for shard in shards)),
    }
    write_atomic(root / "build.json", (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
    return record


def _move(path: Path, place: Path) -> None:
    """Move a shard to its place, unless an interrupted run did already."""
    if path.is_file():
        place.parent.mkdir(exist_ok=True)
        os.replace(path, place)
        sync_folder(place.parent)


def _shard_row(folder: str, split: str, info: ShardInfo) -> dict[str, Any]:
    facts = {"samples": info.samples, "bytes": info.bytes, "sha256": info.sha256}
    return {"folder": folder, "split": split, "name": info.name, **facts}


def _count(job: Job, media: pa.Table, dialogues: pa.Table, ledger: pa.Table) -> list[dict[str, Any]]:
    """Per entry, in plan order: what was built and what was left out; checks that no dialogue was lost on the way."""
    outcomes = map_table(job.work / "outcomes.arrow")["row"].to_numpy()
    entry = map_table(job.work / "plan" / "media.arrow")["entry"].to_numpy()[outcomes >= 0]
    row = outcomes[outcomes >= 0]
    lengths = pc.list_value_length(media["timestamps"]).to_numpy()[row]
    sizes = media["size"].to_numpy()[row]
    built = {
        name: np.bincount(entry, weights=weights, minlength=len(job.entries)).astype(np.int64).tolist()
        for name, weights in (("media", None), ("frames", lengths), ("bytes", sizes))
    }
    written = {item["values"]: item["counts"] for item in dialogues["entry"].value_counts().to_pylist()}
    groups = ledger.group_by(["entry", "kind", "reason"]).aggregate([([], "count_all")]).to_pylist()
    plan = json.loads((job.work / "plan" / "tasks.json").read_bytes())["samples"]
    counts = []
    for number, name in enumerate(job.entries):
        mine = sorted((g["kind"], g["reason"], g["count_all"]) for g in groups if g["entry"] == name)
        left_out = {kind: {reason: n for k, reason, n in mine if k == kind} for kind in sorted({k for k, _, _ in mine})}
        planned = plan[name]
        done = written.get(name, 0) + sum(left_out.get("dialogue", {}).values())
        if done != planned:
            raise WorkError(f"entry {name}: {planned} dialogues were planned, {done} are in the shards or the ledger")
        facts = {key: values[number] for key, values in built.items()}
        counts.append(
            {"name": name, "planned": planned, "dialogues": written.get(name, 0), **facts, "left_out": left_out}
        )
    return counts
