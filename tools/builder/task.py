"""Run one task in a worker: from its rows of the plan to a shard with its index and ledger rows.

A finished task is a folder in the work folder. It appears atomically, by a rename::

    tasks/video-train-000003/shard.tar      missing if nothing of the task could be built
                             rows.arrow     index rows in the order of the shard, each with its row in the plan
                             ledger.arrow   what was left out, or recovered in part
                             record.json    digests of these files, ShardInfo of shard.tar, and BuildJob.inputs
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from framestream.pipeline.config.data import FOLDER_READERS
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig
from framestream.pipeline.media.decode import VideoRequest
from framestream.pipeline.media.decoders.base import DecoderConfig
from framestream.pipeline.media.decoders.choice import check_decoder
from framestream.pipeline.media.errors import DecoderError, MediaError
from framestream.pipeline.media.sampling import media_seed
from framestream.pipeline.shards.encode import EncodedMedia, encode_image_file, encode_video
from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, FRAME_DIGEST, NOMINAL, build_table, media_schema
from framestream.pipeline.shards.ledger import LedgerRow, ledger_table
from framestream.pipeline.shards.samples import dialogue_metadata, media_metadata
from framestream.pipeline.shards.writer import ShardInfo, ShardWriter
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.tools.builder.prefetch import PREFETCH_FILES, prefetch
from framestream.tools.builder.worker_pool import LostItems, Report, Run
from framestream.tools.common.arrow_files import map_table, write_table
from framestream.tools.common.sealed_folder import read_seal, seal_folder
from framestream.tools.fetch.base import FetchError, MediaSource
from framestream.tools.fetch.disk_cache import CachedSource, DiskCache, disk_full_at, is_disk_full
from framestream.tools.fetch.root_map import ResolvedLocation

FETCH_GRACE = 60.0  #: seconds beyond its own limit after which a fetch is stopped with its process
OPEN_SECONDS = 6 * 3600.0  #: time limit for opening a source: archives are read once to list their members

PLAN_ROW = pa.field("plan_row", pa.int64())
#: For each row of the plan's media: its row in the index or -1, and why it has none.
OUTCOMES = pa.schema([("row", pa.int32()), ("reason", pa.string())])


@dataclasses.dataclass(frozen=True, slots=True)
class BuildJob:
    """What workers need to know about a build. It is sent to each of them once."""

    work: Path
    tasks: tuple[str, ...]  #: name of each task
    entries: tuple[str, ...]  #: name of each entry
    locations: tuple[ResolvedLocation, ...]  #: location of each entry's media
    frames: FramesConfig
    images: ImagesConfig
    seed: int
    compat: str
    decoding: DecoderConfig  #: the decoder of videos
    cache_bytes: int  #: disk space for fetched files, because several media may be clips of one file
    fetch_seconds: float  #: time limit for fetching one file
    decode_seconds: float  #: time limit for decoding and encoding one media item
    inputs: str  #: digest of what the results of tasks follow from: the plan and, for dialogues, the outcomes of media


def task_folder(work: Path, name: str) -> Path:
    """Return the folder with the results of a finished task."""
    return work / "tasks" / name


def read_shard_info(folder: Path) -> ShardInfo | None:
    """Read the ShardInfo of a finished task; None if it has no shard.

    Raises:
        DamagedFolderError: the record of the task is damaged.
    """
    values = read_seal(folder)["shard"]
    return values and ShardInfo(**{**values, "sample_offsets": tuple(values["sample_offsets"])})


def is_dialogue(name: str) -> bool:
    """Return whether a task writes dialogues; other tasks build media."""
    return name.startswith("dialogue-")


def make_worker(job: BuildJob) -> Run:
    """Return the function that a worker process calls for each task.

    Raises:
        DecoderError: the decoder of the build cannot be used on this machine.
    """
    check_decoder(job.decoding)
    plan, sources = _PlanReader(job), _MediaSources(job)

    def run(task: int, lost: LostItems, careful: bool, report: Report) -> None:
        with disk_full_at(job.work), _task_result(job, task) as result:
            if is_dialogue(job.tasks[task]):
                _write_dialogues(job, plan, task, result)
            else:
                _build_media(job, plan, sources, task, result, lost, careful, report)

    return run


def _build_media(
    job: BuildJob,
    plan: _PlanReader,
    sources: _MediaSources,
    task: int,
    result: _TaskResult,
    lost: LostItems,
    careful: bool,
    report: Report,
) -> None:
    rows = plan.task_rows(task)
    for entry, row in plan.first_rows_by_entry(row for row in rows if row not in lost):
        report(row, {}, OPEN_SECONDS)
        with contextlib.suppress(Exception):  # the items will raise it again
            sources.open(entry)

    def items() -> Iterator[dict[str, Any]]:
        for row in rows:
            if careful:  # report the item before its fetch begins
                report(row, {}, job.fetch_seconds + FETCH_GRACE)
            yield plan.media_item(row)

    def fetch(item: Mapping[str, Any], folder: Path) -> Path:
        if item["row"] in lost:
            raise _lost_item_error(*lost[item["row"]])
        return sources.fetch(item, folder)

    for item, file in prefetch(items(), fetch, result.scratch / "fetched", 1 if careful else PREFETCH_FILES):
        row = item["row"]
        try:
            report(row, {}, job.fetch_seconds + FETCH_GRACE)
            path = _wait_for_file(item, file)
            report(row, {}, job.decode_seconds)
            members, columns, damage = _build_sample(job, path, item, plan.sole_dialogues(item))
        except _MediaBuildError as error:
            result.leave_out(job, item, error.reason, str(error), attempts=error.attempts)
            report(None, {"media": 1})
            continue
        if damage:
            result.leave_out(job, item, "truncated", damage, kind="salvaged")
        result.add_media(row, item, members, columns)
        report(None, {"media": 1, "frames": len(columns["timestamps"])})


def _write_dialogues(job: BuildJob, plan: _PlanReader, task: int, result: _TaskResult) -> None:
    """Write the dialogues of a task whose media are all in the index. All media tasks must be finished."""
    outcomes = map_table(job.work / "outcomes.arrow", checked=True)
    index_rows = outcomes["row"].to_numpy()
    for plan_row, item in plan.task_dialogues(task):
        media = index_rows[item["media"]].tolist() if item["media"] else []
        if -1 in media:
            row = item["media"][media.index(-1)]
            name, reason = plan.media["source"][row].as_py(), outcomes["reason"][row].as_py()
            result.leave_out_dialogue(item, reason, f"{name} could not be built")
        else:
            result.add_dialogue(plan_row, item, media, [plan.media["key"][row].as_py() for row in item["media"]])


class _MediaBuildError(Exception):
    """A media item cannot be built. Has the reason for the ledger."""

    def __init__(self, reason: str, message: str, attempts: int = 1) -> None:
        super().__init__(message)
        self.reason, self.attempts = reason, attempts


def _lost_item_error(reason: str, attempts: int) -> _MediaBuildError:
    texts = {
        "timeout": "exceeded data.decode_timeout, or data.fetch_timeout, and was stopped",
        "crashed": f"the process that decoded it died, {attempts} times",
    }
    return _MediaBuildError(reason, texts[reason], attempts)


class _MediaSources:
    """The sources of a worker's media. They are opened on first use, and the fetch threads share them."""

    def __init__(self, job: BuildJob) -> None:
        self._locations = job.locations
        self._cache = DiskCache(job.work / "cache", job.cache_bytes)
        self._opened: dict[str, MediaSource] = {}
        self._locks = {location.name: threading.Lock() for location in job.locations}

    def open(self, entry: int) -> MediaSource:
        """Return the source of an entry's media. One thread opens it while others wait."""
        location = self._locations[entry]
        with self._locks[location.name]:
            if location.name not in self._opened:
                source = location.open()
                self._opened[location.name] = source if location.path else CachedSource(source, self._cache)
        return self._opened[location.name]

    def fetch(self, item: Mapping[str, Any], scratch: Path) -> Path:
        """Fetch the file of a media item. Several threads call this; ``scratch`` is on the cache's file system."""
        return self.open(item["entry"]).fetch(item["path"], scratch, tree=item["reader"] in FOLDER_READERS)


def _wait_for_file(item: Mapping[str, Any], file: Future[Path]) -> Path:
    try:
        return file.result()
    except _MediaBuildError:
        raise
    except FetchError as error:
        raise _MediaBuildError(error.reason, str(error)) from None
    except Exception as error:  # third-party code reads archives and server responses
        if is_disk_full(error):
            raise
        raise _MediaBuildError("crashed", _describe(item, error)) from error


def _describe(item: Mapping[str, Any], error: Exception) -> str:
    return f"{item['source']}: {type(error).__name__}: {' '.join(str(error).split())}"


class _PlanReader:
    """Reads the plan, which was checked before, through memory maps."""

    def __init__(self, job: BuildJob) -> None:
        self.media = map_table(job.work / "plan" / "media.arrow", checked=True)
        self._dialogues = map_table(job.work / "plan" / "dialogues.arrow", checked=True)
        self._media_tasks = self.media["task"].to_numpy()
        self._dialogue_tasks = self._dialogues["task"].to_numpy()

    def task_rows(self, task: int) -> list[int]:
        """Return the rows of the media of a task."""
        return np.flatnonzero(self._media_tasks == task).tolist()

    def first_rows_by_entry(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Return the entries that the media ``rows`` belong to, each with its first row."""
        first: dict[int, int] = {}
        for row in rows:
            first.setdefault(self.media["entry"][row].as_py(), row)
        return list(first.items())

    def media_item(self, row: int) -> dict[str, Any]:
        """Return the columns of a media item, and its ``row`` in the plan."""
        return {**self.media.slice(row, 1).to_pylist()[0], "row": row}

    def sole_dialogues(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the dialogues that have an item as their only media, as its JSON member contains them."""
        columns = ("key", "id", "entry", "conversations")
        dialogues = [{name: self._dialogues[name][row].as_py() for name in columns} for row in item["dialogues"]]
        return [{**dialogue, "conversations": json.loads(dialogue["conversations"])} for dialogue in dialogues]

    def task_dialogues(self, task: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the row and the columns of each dialogue of a task."""
        rows = np.flatnonzero(self._dialogue_tasks == task)
        first = int(rows[0])
        for batch in self._dialogues.slice(first, int(rows[-1]) + 1 - first).to_batches():
            for row, item in enumerate(batch.to_pylist(), first):
                if item["task"] == task:
                    yield row, item
            first += len(batch)


class _TaskResult:
    """Collects the results of a task."""

    def __init__(self, task: int, shard: ShardWriter, scratch: Path) -> None:
        self._task, self._shard = task, shard
        self.scratch = scratch  #: folder for temporary files
        self.rows: list[dict[str, Any]] = []
        self.ledger: list[LedgerRow] = []

    def add_media(
        self, plan_row: int, item: Mapping[str, Any], members: Mapping[str, bytes], columns: dict[str, Any]
    ) -> None:
        """Add a media item to the shard. Frame offsets in ``columns`` count from the start of its first member."""
        spans = self._shard.add(item["key"], members)
        offset, size = next(iter(spans.values()))
        frame_offsets = [offset + frame_offset for frame_offset in columns["frame_offset"]]
        row = {**columns, "frame_offset": frame_offsets, "offset": offset, "size": size}
        self.rows.append({**row, "shard": self._task, "split": item["split"], PLAN_ROW.name: plan_row})

    def add_dialogue(self, plan_row: int, item: Mapping[str, Any], media: list[int], keys: list[str]) -> None:
        """Add a dialogue to the shard. ``media`` and ``keys`` are the index rows and keys of its media."""
        texts = {name: item[name] for name in ("key", "id", "entry", "split")}
        turns, meta = json.loads(item["conversations"]), json.loads(item["meta"])
        self._shard.add(item["key"], {"json": dialogue_metadata(**texts, media=keys, conversations=turns, meta=meta)})
        columns = {name: item[name] for name in DIALOGUE_SCHEMA.names}
        self.rows.append({**columns, "media": media, PLAN_ROW.name: plan_row})

    def leave_out(
        self, job: BuildJob, item: Mapping[str, Any], reason: str, message: str, kind: str = "media", attempts: int = 1
    ) -> None:
        """Add a ledger row about a media item. Its message names files as the manifest does."""
        entry, key, source = job.entries[item["entry"]], item["key"], item["source"]
        if folder := job.locations[item["entry"]].path:
            root = source.removesuffix(item["path"])
            message = re.sub(rf"(?<![^\s:'\"(]){re.escape(str(folder))}/", lambda found: root, message)
        attempts += item["attempts"]
        self.ledger.append(LedgerRow(entry, kind, reason, message, key=key, source=source, attempts=attempts))

    def leave_out_dialogue(self, item: Mapping[str, Any], reason: str, message: str) -> None:
        """Add a ledger row about a dialogue."""
        key, source = item["key"], item["source"]
        row = LedgerRow(item["entry"], "dialogue", reason, message, dialogue=item["id"], key=key, source=source)
        self.ledger.append(row)


@contextlib.contextmanager
def _task_result(job: BuildJob, task: int) -> Iterator[_TaskResult]:
    """Collect the results of a task. Its folder appears when the block ends."""
    final = task_folder(job.work, job.tasks[task])
    scratch = final.with_name(f"{final.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with ShardWriter(scratch / "shard.tar") as shard:
        result = _TaskResult(task, shard, scratch)
        yield result
    schema = DIALOGUE_SCHEMA if is_dialogue(final.name) else media_schema(job.compat)
    write_table(scratch / "rows.arrow", build_table(schema.append(PLAN_ROW), result.rows))
    write_table(scratch / "ledger.arrow", ledger_table(result.ledger))
    info = dataclasses.asdict(shard.info) if shard.samples else None
    seal_folder(scratch, {"shard": info, "inputs": job.inputs})
    try:
        os.rename(scratch, final)
    except OSError:
        if not final.is_dir():  # else a worker of a killed build was first, with the same bytes
            raise
        shutil.rmtree(scratch)
    fsync_path(final.parent)


# Media ----------------------------------------------------------------------------------------------------------------


def _build_sample(
    job: BuildJob, path: Path, item: Mapping[str, Any], dialogues: list[dict[str, Any]]
) -> tuple[dict[str, bytes], dict[str, Any], str]:
    """Decode and encode one media item.

    Returns:
        The members of its sample, its index columns (with frame offsets from the member's start), and where the file is
        damaged if it was salvaged.

    Raises:
        _MediaBuildError: decoding or encoding failed, for whatever reason.
    """
    try:
        encoded = _encode(job, path, item)
    except MediaError as error:
        local = path if job.locations[item["entry"]].path else item["source"]  # a fetched file has a temporary name
        raise _MediaBuildError(error.reason, str(error).replace(str(path), str(local))) from None
    except DecoderError:  # every other item would fail, too
        raise
    except Exception as error:  # decoders are third-party code, and one item must not end a build
        raise _MediaBuildError("crashed", _describe(item, error)) from error
    columns = {**encoded.columns, "key": item["key"], "kind": item["kind"], "source": item["source"]}
    columns["sha256"] = hashlib.sha256(encoded.data).hexdigest()
    index_only = ("frame_offset", "frame_size", FRAME_DIGEST, NOMINAL.name)
    fields = {name: value for name, value in columns.items() if name not in index_only}
    extension = "mp4" if item["kind"] == "video" else "jpg"
    json_member = media_metadata(**fields, salvaged=bool(encoded.damage), dialogues=dialogues)
    return {extension: encoded.data, "json": json_member}, columns, encoded.damage


def _encode(job: BuildJob, path: Path, item: Mapping[str, Any]) -> EncodedMedia:
    if item["kind"] == "image":
        return encode_image_file(path, job.images)
    seed, bounds = media_seed(job.seed, item["key"]), (item["start"], item["end"])
    names = (job.compat, item["split"], item["source"])
    request = VideoRequest(item["reader"], job.frames, *bounds, seed, *names, job.decoding)
    return encode_video(path, request)
