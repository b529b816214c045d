"""Build a shard root from a manifest, resume an interrupted build, or add to a finished root.

The work folder of an unfinished root holds the plan and the results of every finished task. Both appear atomically, so
the same command after a kill continues where it stopped. The last steps (``tools/builder/finalize.py``) only move and
derive files: doing them twice gives the same bytes.

A finished root is extended if the manifest has new entries, or to retry failures. Until the last steps the root stays
unchanged and readable.

Machines that share a file system can share the tasks. Machine i of n takes every n-th task, and the last machine to
finish does the last steps. Locks (:mod:`framestream.pipeline.utils.locks`) belong to the kernel, so they end with their
process.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from framestream.pipeline.annotations.reader import AnnotationFileError
from framestream.pipeline.config.manifest import BuildManifest
from framestream.pipeline.media.decoders.base import DecoderConfig
from framestream.pipeline.media.decoders.choice import check_decoder
from framestream.pipeline.media.errors import DecoderError
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.ledger import RETRYABLE
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.locks import LockError, lock_file, lock_folder
from framestream.tools.builder.build_spec import difference, specification, without_additions
from framestream.tools.builder.executors import Executor
from framestream.tools.builder.finalize import finish, write_outcomes
from framestream.tools.builder.incremental import ExistingBuild, Selection, read_build_record, snapshot
from framestream.tools.builder.planner import make_plan
from framestream.tools.builder.task import BuildJob, is_dialogue, task_folder
from framestream.tools.common.arrow_files import map_table
from framestream.tools.common.errors import BuildError
from framestream.tools.common.sealed_folder import SEAL, DamagedFolderError, check_folder, seal_folder
from framestream.tools.fetch.root_map import ResolvedEntry, resolve_entries

logger = logging.getLogger(__name__)

LOCK_FILES = ("build.lock", "step.lock")  #: files that are locked; they exist while a build runs, or after a kill
REMOVED_WORK = "work.done"  #: name of the work folder while it is removed


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """How a build runs. The first three decide what is built; the others do not change any bytes."""

    limit: int | None = None  #: use only the first ``limit`` samples of each entry
    skip_unresolved: bool = False  #: leave out entries whose annotations or media cannot be found
    retry_failed: bool = False  #: retry what failed for a temporary reason
    rank: int = 0  #: number of this machine
    ranks: int = 1  #: number of machines that share this build
    cache_bytes: int = 0  #: disk space for fetched files, because several media may be clips of one file
    workers_here: bool = True  #: the executor's workers decode on this machine


@dataclass(frozen=True, slots=True)
class BuildResult:
    """Result of a build."""

    record: Mapping[str, Any] | None  #: contents of build.json; None while other machines still work
    built: bool = True  #: False if there was nothing to do
    media_left: int = 0  #: media that other machines still have to build


def build(manifest: BuildManifest, executor: Executor, options: BuildOptions) -> BuildResult:
    """Build ``manifest.shard_root``, or this machine's share of it.

    Raises:
        BuildError: input is missing, no dialogue can be used, the decoder or its device cannot be used, or the folder
            contains another build.
        WorkerError: a worker failed.
        AnnotationFileError: an annotation file is broken.
    """
    root = manifest.shard_root
    entries = resolve_entries(manifest)
    with _decoder_errors():
        wanted = specification(manifest, entries, options.limit)
    if record := _finished_record(root, wanted, entries, options.retry_failed):
        _remove_leftovers(root)
        return BuildResult(record, built=False)
    if options.workers_here:
        with _decoder_errors():
            check_decoder(DecoderConfig.of(manifest.data))
    with _lock_root(root, shared=options.ranks > 1):
        with _lock_step(root):
            if not _plan(manifest, entries, wanted, root, options):
                return BuildResult(_read_record(root), built=False)
        job = make_job(manifest, entries, root / "work", options.cache_bytes)
        _run_media(job, root, executor, options)
        with _lock_step(root):
            if not (job.work / "plan").is_dir():  # another machine did the last steps
                return BuildResult(_read_record(root))
            _drop_damaged(job, root, _media_tasks(job), large="shard.tar")  # those of other machines
            if unfinished := _unfinished_tasks(job):
                return BuildResult(None, media_left=int(_task_sizes(job)[unfinished].sum()))
            _run_dialogues(job, root, executor)
            record = finish(root, job, wanted)
            _remove_work(job.work)
        return BuildResult(record)


@contextlib.contextmanager
def _decoder_errors() -> Iterator[None]:
    try:
        yield
    except DecoderError as error:
        raise BuildError(str(error)) from None


def _remove_work(work: Path) -> None:
    """Remove the work folder; first it is renamed, so that a kill leaves no part of it under its name."""
    done = work.with_name(REMOVED_WORK)
    try:
        os.rename(work, done)
    except OSError:  # a layered file system may refuse to rename a folder (EXDEV)
        (work / "plan" / SEAL).unlink(missing_ok=True)
        done = work
    shutil.rmtree(done, ignore_errors=True)  # a network file system may keep files that are still mapped


def _remove_leftovers(root: Path) -> None:
    """Remove what a kill in the last moments of a build has left in a finished root, unless a build runs there."""
    if any((root / name).exists() for name in (REMOVED_WORK, *LOCK_FILES)):
        with contextlib.suppress(BuildError, OSError), _lock_root(root, shared=False):
            shutil.rmtree(root / REMOVED_WORK, ignore_errors=True)


@contextlib.contextmanager
def _lock_root(root: Path, shared: bool) -> Iterator[None]:
    """Lock ``root`` against other builds, or only against builds that are not ``shared``."""
    try:
        with lock_folder(root, "build.lock", "build", shared):
            try:
                yield
            finally:
                if not (root / "work").exists():
                    for name in LOCK_FILES:
                        (root / name).unlink(missing_ok=True)
    except LockError as error:
        raise BuildError(str(error)) from None


@contextlib.contextmanager
def _lock_step(root: Path) -> Iterator[None]:
    """Wait for, and take, the lock of the steps that only one machine at a time may run: planning and finishing."""
    with lock_file(root / "step.lock", "build", wait=True):
        yield


def _finished_record(
    root: Path, wanted: Mapping[str, Any], entries: Sequence[ResolvedEntry], retry: bool
) -> dict[str, Any] | None:
    """Return the record of a finished root to which nothing is to be added. Nothing is written, not even a lock."""
    if os.path.exists(root / "work") or not os.path.isfile(root / "build.json"):
        return None
    record = read_build_record(root / "build.json")
    reasons = {reason for entry in record["entries"] for reason in entry["left_out"].get("dialogue", {})}
    if difference(record["specification"], wanted, entries) or (retry and reasons.intersection(RETRYABLE)):
        return None
    return _read_record(root)


def _read_record(root: Path) -> dict[str, Any]:
    """Return the record of a finished root whose index and shards are as they were written, as far as sizes tell."""
    record = read_build_record(root / "build.json")
    try:
        Index.open(root).check_shard_files()
    except ShardsError as error:
        raise BuildError(str(error)) from None
    return record


def _require_same_specification(
    root: Path, built: Mapping[str, Any], wanted: Mapping[str, Any], entries: Sequence[ResolvedEntry], finished: bool
) -> None:
    if text := difference(built, wanted, entries):
        kind = "another build" if finished else "another build, which is not finished"
        fix = "undo the difference" if finished else "finish it with its original settings"
        raise BuildError(f"{root}: contains {kind}: {text}; give another --out, remove {root}, or {fix}")


def _plan(
    manifest: BuildManifest,
    entries: Sequence[ResolvedEntry],
    wanted: Mapping[str, Any],
    root: Path,
    options: BuildOptions,
) -> bool:
    """Create work/plan atomically unless it exists. Return False if the root is finished and nothing is to be added.

    A damaged plan is made again. Results of tasks that belong to it stay if it comes out the same.
    """
    work, folder, scratch = root / "work", root / "work" / "plan", root / "work" / "plan.tmp"
    is_damaged = False
    if folder.is_dir():
        try:
            planned = check_folder(folder)["specification"]
            _require_same_specification(root, planned, wanted, entries, finished=False)
            return True
        except DamagedFolderError as error:
            logger.warning("%s; the build is planned again", error)
            is_damaged = True
    for leftover in (scratch if is_damaged else work, root / REMOVED_WORK):
        shutil.rmtree(leftover, ignore_errors=True)
    is_finished = (root / "build.json").is_file()
    unknown = [path.name for path in sorted(root.iterdir()) if path.name not in LOCK_FILES]
    if unknown and not is_finished and not is_damaged:
        raise BuildError(f"{root}: contains {unknown[0]}, which is not part of a build; give another --out")
    scratch.mkdir(parents=True)
    try:
        if is_finished:
            built = _read_record(root)["specification"]
            _require_same_specification(root, built, without_additions(built, wanted), entries, finished=True)
            snapshot(root, scratch / "previous")
        elif (folder / "previous").is_dir():  # an addition was in its last steps
            if not (folder / "previous" / "build.json").is_file():
                raise BuildError(
                    f"{folder / 'previous' / 'build.json'}: missing; restore {root} from a copy, or remove it"
                )
            shutil.copytree(folder / "previous", scratch / "previous")
        selection = Selection(ExistingBuild.open(scratch / "previous", manifest.compat), wanted, options.retry_failed)
        strict = not options.skip_unresolved
        if not selection.may_add() or not make_plan(manifest, entries, scratch, options.limit, strict, selection):
            if not is_finished:
                raise BuildError(f"{root}: the plan of an addition is damaged; repeat the command that began it")
            shutil.rmtree(work)
            return False
    except (BuildError, AnnotationFileError):
        shutil.rmtree(scratch if is_damaged else work)
        raise
    seal_folder(scratch, {"specification": wanted})
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(scratch, folder)
    fsync_path(work)
    return True


def make_job(manifest: BuildManifest, entries: Sequence[ResolvedEntry], work: Path, cache_bytes: int = 0) -> BuildJob:
    """Return what workers need to know about the build whose plan is in ``work``."""
    return BuildJob(
        work=work,
        tasks=tuple(json.loads((work / "plan" / "tasks.json").read_bytes())["tasks"]),
        entries=tuple(item.entry.name for item in entries),
        locations=tuple(item.media for item in entries),
        frames=manifest.frames,
        images=manifest.images,
        seed=manifest.seed,
        compat=manifest.compat,
        decoding=DecoderConfig.of(manifest.data),
        cache_bytes=cache_bytes,
        fetch_seconds=manifest.data.fetch_timeout,
        decode_seconds=manifest.data.decode_timeout,
        inputs=file_digest(work / "plan" / SEAL),
    )


# Tasks ----------------------------------------------------------------------------------------------------------------


def _task_sizes(job: BuildJob) -> np.ndarray:
    """Count the media of each task, int64 (tasks,)."""
    tasks = map_table(job.work / "plan" / "media.arrow", checked=True)["task"].to_numpy()
    return np.bincount(tasks[tasks >= 0], minlength=len(job.tasks))


def _unfinished_tasks(job: BuildJob, dialogues: bool = False) -> list[int]:
    """List the unfinished tasks that build media, or that write dialogues."""
    return [
        task
        for task, name in enumerate(job.tasks)
        if is_dialogue(name) == dialogues and not task_folder(job.work, name).is_dir()
    ]


def _media_tasks(job: BuildJob) -> list[int]:
    return [task for task, name in enumerate(job.tasks) if not is_dialogue(name)]


def _drop_damaged(job: BuildJob, root: Path, tasks: Sequence[int], large: str | None = None) -> None:
    """Remove results of finished ``tasks`` that are damaged, or that do not follow from the plan, to make them again.

    Args:
        large: name of a file of which only the size is compared.
    """

    def is_in_root(name: str, size: int, digest: str) -> bool:
        """Return whether the last steps have moved the shard of a task."""
        shards = (path for path in root.glob("*/*.tar") if name == "shard.tar" and path.stat().st_size == size)
        return any(file_digest(path) == digest for path in shards)

    for task in tasks:
        folder = task_folder(job.work, job.tasks[task])
        if not folder.is_dir():
            continue
        try:
            if check_folder(folder, is_in_root, large)["inputs"] == job.inputs:
                continue
            fault = f"{folder}: belongs to another plan"
        except DamagedFolderError as error:
            fault = str(error)
        logger.warning("%s; it is built again", fault)
        shutil.rmtree(folder)


def _run_media(job: BuildJob, root: Path, executor: Executor, options: BuildOptions) -> None:
    """Run the unfinished tasks of this machine."""
    (job.work / "tasks").mkdir(exist_ok=True)
    own_tasks = _media_tasks(job)[options.rank :: options.ranks]
    _drop_damaged(job, root, own_tasks)
    names = {job.tasks[task] for task in own_tasks}
    for scratch in (job.work / "tasks").glob("*.tmp"):
        if scratch.name.partition(".")[0] in names:
            shutil.rmtree(scratch, ignore_errors=True)
    unfinished = sorted(set(_unfinished_tasks(job)).intersection(own_tasks))
    sizes = _task_sizes(job)
    total, frames = int(sizes[own_tasks].sum()), 0
    done = total - int(sizes[unfinished].sum())
    with tqdm(total=total, initial=done, unit=" media", desc="media", disable=None) as bar:
        for counts in executor(job, unfinished):
            frames += counts.get("frames", 0)
            bar.update(counts.get("media", 0))
            if elapsed := bar.format_dict["elapsed"]:
                bar.set_postfix_str(f"{frames / elapsed:.0f} frames/s", refresh=False)


def _run_dialogues(job: BuildJob, root: Path, executor: Executor) -> None:
    """Write the dialogues. All media tasks must be finished."""
    write_outcomes(job)
    job = replace(job, inputs=f"{job.inputs}-{file_digest(job.work / 'outcomes.arrow')}")
    _drop_damaged(job, root, [task for task, name in enumerate(job.tasks) if is_dialogue(name)])
    tasks = _unfinished_tasks(job, dialogues=True)
    for _ in tqdm(executor(job, tasks), total=len(tasks), unit=" reports", desc="dialogues", disable=None, leave=False):
        pass
