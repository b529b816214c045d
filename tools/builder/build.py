"""From a manifest to a finished shard root, through interruptions, and from a finished root to a larger one.

The work folder of an unfinished root holds the plan and the results of every finished task, each of which appears
whole. So the same command after a kill goes on where it was, and the last steps (``framestream.tools.builder.finalize``) only move and
derive: doing them twice gives the same bytes. A finished root is taken up again when the manifest has entries that it
lacks, or to try failures again; until the last steps it stays as it was, and readable.

Many machines on one file system share the tasks: machine i of n takes every n-th one, and the last to be done takes the
last steps. Locks are the kernel's (``framestream.tools.builder.locks``), so that they end with the process that holds them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from framestream.pipeline.annotations.reader import AnnotationFileError
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.utils.atomic_io import fsync_path, write_atomic
from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.builder.build_spec import difference, specification, without_additions
from framestream.tools.builder.executors import Executor
from framestream.tools.builder.finalize import finish, write_outcomes
from framestream.tools.builder.incremental import ExistingBuild, Selection, snapshot
from framestream.tools.builder.locks import LOCKS, lock_root, lock_step
from framestream.tools.builder.planner import make_plan
from framestream.tools.builder.task import BuildJob, is_dialogue, task_folder
from framestream.tools.common.arrow_files import map_table
from framestream.tools.common.errors import BuildError
from framestream.tools.fetch.root_map import ResolvedEntry, resolve_entries


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a build is run; the first three decide what is taken, nothing else changes a byte."""

    limit: int | None = None  #: take only the first so many samples of each entry
    skip_unresolved: bool = False  #: leave out, and count, entries that are not here
    retry_failed: bool = False  #: plan again what failed for a reason that may have passed
    rank: int = 0
    ranks: int = 1  #: machines that share this build
    cache_bytes: int = 0  #: of fetched files that are kept while media are built from them


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build came to."""

    record: Mapping[str, Any] | None  #: contents of build.json; None while other machines are not done
    built: bool = True  #: False if there was nothing to do
    left: int = 0  #: media that other machines still have to build


def build(manifest: Manifest, executor: Executor, options: BuildOptions) -> BuildResult:
    """Build ``manifest.shard_root``, or this machine's share of it.

    Raises:
        BuildError: something the plan needs is not here, no dialogue can be used, or the folder holds another build.
        WorkError: a worker failed.
        AnnotationFileError: an annotation file is broken.
    """
    root = manifest.shard_root
    found = resolve_entries(manifest)
    wanted = specification(manifest, found, options.limit)
    with lock_root(root, shared=options.ranks > 1):
        with lock_step(root):
            if not _plan(manifest, found, wanted, root, options):
                return BuildResult(_record(root), built=False)
        job = make_job(manifest, found, root / "work", options.cache_bytes)
        _run_media(job, executor, options)
        with lock_step(root):
            if not (job.work / "plan").is_dir():  # another machine was done last
                return BuildResult(_record(root))
            if left := _tasks_left(job):
                return BuildResult(None, left=int(_sizes(job)[left].sum()))
            _run_dialogues(job, executor)
            record = finish(root, job, wanted)
            done = root / "work.done"
            os.rename(job.work, done)
            shutil.rmtree(done)
        return BuildResult(record)


def _record(root: Path) -> dict[str, Any]:
    return json.loads((root / "build.json").read_bytes())


def _check_same(
    root: Path, there: Mapping[str, Any], wanted: Mapping[str, Any], found: Sequence[ResolvedEntry], finished: bool
) -> None:
    if other := difference(there, wanted, found):
        what = "another build" if finished else "another build, which is not finished"
        undo = "undo the difference" if finished else "finish it with what it was begun with"
        raise BuildError(f"{root}: holds {what}: {other}; give another --out, remove {root}, or {undo}")


def _plan(
    manifest: Manifest, found: Sequence[ResolvedEntry], wanted: Mapping[str, Any], root: Path, options: BuildOptions
) -> bool:
    """Make work/plan unless it is there; it appears whole. False if the root is finished and nothing is to be added."""
    work, folder, scratch = root / "work", root / "work" / "plan", root / "work" / "plan.tmp"
    if folder.is_dir():
        _check_same(root, json.loads((folder / "specification.json").read_bytes()), wanted, found, finished=False)
        return True
    for leftover in (work, root / "work.done"):
        shutil.rmtree(leftover, ignore_errors=True)
    adds = (root / "build.json").is_file()
    strange = [path.name for path in sorted(root.iterdir()) if path.name not in LOCKS]
    if strange and not adds:
        raise BuildError(f"{root}: holds {strange[0]}, which no build left here; give another --out")
    scratch.mkdir(parents=True)
    try:
        if adds:
            there = _record(root)["specification"]
            _check_same(root, there, without_additions(there, wanted), found, finished=True)
            snapshot(root, scratch / "previous")
        selection = Selection(ExistingBuild.open(scratch / "previous", manifest.compat), wanted, options.retry_failed)
        planned = selection.wants_any() and make_plan(
            manifest, found, scratch, options.limit, not options.skip_unresolved, selection
        )
        if not planned:
            shutil.rmtree(work)
            return False
    except (BuildError, AnnotationFileError):
        shutil.rmtree(work)
        raise
    write_atomic(scratch / "specification.json", canonical_json(wanted).encode())
    os.rename(scratch, folder)
    fsync_path(work)
    return True


def make_job(manifest: Manifest, found: Sequence[ResolvedEntry], work: Path, cache_bytes: int = 0) -> BuildJob:
    """What workers need to know of the build whose plan is in ``work``."""
    return BuildJob(
        work=work,
        tasks=tuple(json.loads((work / "plan" / "tasks.json").read_bytes())["tasks"]),
        entries=tuple(origin.entry.name for origin in found),
        places=tuple(origin.media for origin in found),
        frames=manifest.frames,
        images=manifest.images,
        seed=manifest.seed,
        compat=manifest.compat,
        cache_bytes=cache_bytes,
        fetch_seconds=manifest.data.fetch_timeout,
        decode_seconds=manifest.data.decode_timeout,
    )


# Tasks ----------------------------------------------------------------------------------------------------------------


def _sizes(job: BuildJob) -> np.ndarray:
    """Media of each task, int64 (tasks,)."""
    tasks = map_table(job.work / "plan" / "media.arrow")["task"].to_numpy()
    return np.bincount(tasks[tasks >= 0], minlength=len(job.tasks))


def _tasks_left(job: BuildJob, dialogues: bool = False) -> list[int]:
    """Tasks about media, or about dialogues, that are not finished."""
    return [
        task
        for task, name in enumerate(job.tasks)
        if is_dialogue(name) == dialogues and not task_folder(job.work, name).is_dir()
    ]


def _run_media(job: BuildJob, executor: Executor, options: BuildOptions) -> None:
    """Run this machine's tasks that are not finished."""
    (job.work / "tasks").mkdir(exist_ok=True)
    media = [task for task, name in enumerate(job.tasks) if not is_dialogue(name)]
    mine = media[options.rank :: options.ranks]
    names = {job.tasks[task] for task in mine}
    for scratch in (job.work / "tasks").glob("*.tmp"):
        if scratch.name.partition(".")[0] in names:
            shutil.rmtree(scratch, ignore_errors=True)
    left = sorted(set(_tasks_left(job)).intersection(mine))
    sizes = _sizes(job)
    total, frames = int(sizes[mine].sum()), 0
    done = total - int(sizes[left].sum())
    with tqdm(total=total, initial=done, unit=" media", desc="media", disable=None) as bar:
        for counts in executor(job, left):
            frames += counts.get("frames", 0)
            bar.update(counts.get("media", 0))
            if elapsed := bar.format_dict["elapsed"]:
                bar.set_postfix_str(f"{frames / elapsed:.0f} frames/s", refresh=False)


def _run_dialogues(job: BuildJob, executor: Executor) -> None:
    """Write the dialogues, when the outcome of every media item is known."""
    write_outcomes(job)
    left = _tasks_left(job, dialogues=True)
    for _ in tqdm(executor(job, left), total=len(left), unit=" reports", desc="dialogues", disable=None, leave=False):
        pass
