"""What a worker does: one task, from its rows of the plan to a shard with its index and ledger rows.

A finished task is a folder in the work folder, which appears whole by a rename::

    tasks/video-train-000003/shard.tar      absent if nothing of the task could be built
                             shard.json     ShardInfo of shard.tar
                             rows.arrow     index rows in the order of the shard, each with its row in the plan
                             ledger.arrow   what was left out, or salvaged
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
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
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.sampling import media_seed
from framestream.pipeline.shards.encode import EncodedMedia, encode_image_file, encode_video
from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, NOMINAL, build_table, media_schema
from framestream.pipeline.shards.ledger import LedgerRow, ledger_table
from framestream.pipeline.shards.samples import dialogue_metadata, media_metadata
from framestream.pipeline.shards.writer import ShardInfo, ShardWriter
from framestream.pipeline.utils.atomic_io import fsync_path, write_atomic
from framestream.pipeline.utils.canonical_json import canonical_json
from framestream.tools.builder.prefetch import AHEAD, prefetch
from framestream.tools.builder.worker_pool import Report, Run
from framestream.tools.common.arrow_files import map_table, write_table
from framestream.tools.fetch.base import FetchError, MediaSource
from framestream.tools.fetch.disk_cache import Cache, CachedSource, disk_full_at, is_full
from framestream.tools.fetch.root_map import ResolvedLocation

GRACE = 60.0  #: seconds that fetching gets beyond its own limit before the process is stopped
OPENING = 6 * 3600.0  #: seconds that opening a place may take: archives are read through once to list what they hold

PLAN_ROW = pa.field("plan_row", pa.int64())
#: Of each row of the plan's media: its row in the index or -1, and the reason why it has none.
OUTCOMES = pa.schema([("row", pa.int32()), ("reason", pa.string())])


@dataclasses.dataclass(frozen=True, slots=True)
class BuildJob:
    """What workers need to know of a build; goes to them once."""

    work: Path
    tasks: tuple[str, ...]  #: name of each task
    entries: tuple[str, ...]  #: name of each entry
    places: tuple[ResolvedLocation, ...]  #: where each entry's media are
    frames: FramesConfig
    images: ImagesConfig
    seed: int
    compat: str
    cache_bytes: int  #: of fetched files that are kept, because several media may be clips of one
    fetch_seconds: float  #: that bringing one file here may take
    decode_seconds: float  #: that decoding and encoding one media item may take


def task_folder(work: Path, name: str) -> Path:
    """Where the results of a finished task are."""
    return work / "tasks" / name


def read_shard_info(folder: Path) -> ShardInfo | None:
    """The shard of a finished task; None if it has none."""
    path = folder / "shard.json"
    if not path.is_file():
        return None
    values = json.loads(path.read_bytes())
    return ShardInfo(**{**values, "sample_offsets": tuple(values["sample_offsets"])})


def is_dialogue(name: str) -> bool:
    """Whether a task writes dialogues; the others build media."""
    return name.startswith("dialogue-")


def make_worker(job: BuildJob) -> Run:
    """What a worker process does with a task."""
    plan, sources = _Plan(job), _Sources(job)

    def run(task: int, lost: Mapping[int, tuple[str, int]], careful: bool, report: Report) -> None:
        with disk_full_at(job.work), _result(job, task) as result:
            if is_dialogue(job.tasks[task]):
                _write_dialogues(job, plan, task, result)
            else:
                _build_media(job, plan, sources, task, result, lost, careful, report)

    return run


def _build_media(
    job: BuildJob,
    plan: _Plan,
    sources: _Sources,
    task: int,
    result: _Result,
    lost: Mapping[int, tuple[str, int]],
    careful: bool,
    report: Report,
) -> None:
    rows = plan.rows_of(task)
    for entry, row in plan.first_of_entries(row for row in rows if row not in lost):
        report(row, {}, OPENING)
        with contextlib.suppress(Exception):  # the items will meet it again
            sources.open(entry)

    def items() -> Iterator[dict[str, Any]]:
        for row in rows:
            if careful:  # before anything is done about it
                report(row, {}, job.fetch_seconds + GRACE)
            yield plan.media_item(row)

    def fetch(item: Mapping[str, Any], folder: Path) -> Path:
        if item["row"] in lost:
            raise _lost(*lost[item["row"]])
        return sources.fetch(item, folder)

    for item, file in prefetch(items(), fetch, result.scratch / "fetched", 1 if careful else AHEAD):
        row = item["row"]
        try:
            report(row, {}, job.fetch_seconds + GRACE)
            path = _arrived(item, file)
            report(row, {}, job.decode_seconds)
            members, columns, salvaged = _build(job, path, item, plan.alone(item))
        except _MediaBuildError as error:
            result.leave_out(job, item, error.reason, str(error), attempts=error.attempts)
            report(None, {"media": 1})
            continue
        if salvaged:
            message = f"the stream is damaged; {columns['vlen']} frames of it were kept"
            result.leave_out(job, item, "truncated", message, kind="salvaged")
        result.add_media(row, item, members, columns)
        report(None, {"media": 1, "frames": len(columns["timestamps"])})


def _write_dialogues(job: BuildJob, plan: _Plan, task: int, result: _Result) -> None:
    """The dialogues of a task whose media are all in the index; the outcome of every media item is known by then."""
    outcomes = map_table(job.work / "outcomes.arrow")
    index_rows = outcomes["row"].to_numpy()
    for plan_row, item in plan.dialogues_of(task):
        media = index_rows[item["media"]].tolist() if item["media"] else []
        if -1 in media:
            row = item["media"][media.index(-1)]
            name, reason = plan.media["source"][row].as_py(), outcomes["reason"][row].as_py()
            result.leave_out_dialogue(item, reason, f"{name} could not be built")
        else:
            result.add_dialogue(plan_row, item, media, [plan.media["key"][row].as_py() for row in item["media"]])


class _MediaBuildError(Exception):
    """A media item that cannot be built, with its reason for the ledger."""

    def __init__(self, reason: str, message: str, attempts: int = 1) -> None:
        super().__init__(message)
        self.reason, self.attempts = reason, attempts


def _lost(reason: str, attempts: int) -> _MediaBuildError:
    texts = {
        "timeout": "took longer than data.decode_timeout, or than data.fetch_timeout to arrive, and was stopped",
        "crashed": f"the process that decoded it died, {attempts} times",
    }
    return _MediaBuildError(reason, texts[reason], attempts)


class _Sources:
    """The sources of a worker's media, opened when first used and shared by the threads that fetch."""

    def __init__(self, job: BuildJob) -> None:
        self._places = job.places
        self._cache = Cache(job.work / "cache", job.cache_bytes)
        self._opened: dict[str, MediaSource] = {}
        self._locks = {place.name: threading.Lock() for place in job.places}

    def open(self, entry: int) -> MediaSource:
        """The source of an entry's media; one thread opens it while others wait."""
        place = self._places[entry]
        with self._locks[place.name]:
            if place.name not in self._opened:
                source = place.open()
                self._opened[place.name] = source if place.path else CachedSource(source, self._cache)
        return self._opened[place.name]

    def fetch(self, item: Mapping[str, Any], scratch: Path) -> Path:
        """Called by several threads; ``scratch`` lies on the cache's file system."""
        return self.open(item["entry"]).fetch(item["path"], scratch, tree=item["reader"] in FOLDER_READERS)


def _arrived(item: Mapping[str, Any], file: Future[Path]) -> Path:
    try:
        return file.result()
    except _MediaBuildError:
        raise
    except FetchError as error:
        raise _MediaBuildError(error.reason, str(error)) from None
    except Exception as error:  # what reads archives and answers of servers is other people's code, too
        if is_full(error):
            raise
        raise _MediaBuildError("crashed", _described(item, error)) from error


def _described(item: Mapping[str, Any], error: Exception) -> str:
    return f"{item['source']}: {type(error).__name__}: {' '.join(str(error).split())}"


class _Plan:
    """A worker's view of the plan, over memory maps."""

    def __init__(self, job: BuildJob) -> None:
        self.media = map_table(job.work / "plan" / "media.arrow")
        self._dialogues = map_table(job.work / "plan" / "dialogues.arrow")
        self._media_tasks = self.media["task"].to_numpy()
        self._dialogue_tasks = self._dialogues["task"].to_numpy()

    def rows_of(self, task: int) -> list[int]:
        """Rows of the media of a task."""
        return np.flatnonzero(self._media_tasks == task).tolist()

    def first_of_entries(self, rows: Iterable[int]) -> list[tuple[int, int]]:
        """Each entry that names one of the media ``rows`` first, with the first such row."""
        found: dict[int, int] = {}
        for row in rows:
            found.setdefault(self.media["entry"][row].as_py(), row)
        return list(found.items())

    def media_item(self, row: int) -> dict[str, Any]:
        """Columns of a media item, and its ``row`` in the plan."""
        return {**self.media.slice(row, 1).to_pylist()[0], "row": row}

    def alone(self, item: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The dialogues about a media item alone, as its JSON member shows them."""
        columns = ("key", "id", "entry", "conversations")
        found = [{name: self._dialogues[name][row].as_py() for name in columns} for row in item["dialogues"]]
        return [{**dialogue, "conversations": json.loads(dialogue["conversations"])} for dialogue in found]

    def dialogues_of(self, task: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row and columns of each dialogue of a task."""
        rows = np.flatnonzero(self._dialogue_tasks == task)
        first = int(rows[0])
        for batch in self._dialogues.slice(first, int(rows[-1]) + 1 - first).to_batches():
            for row, item in enumerate(batch.to_pylist(), first):
                if item["task"] == task:
                    yield row, item
            first += len(batch)


class _Result:
    """The results of a task while it runs."""

    def __init__(self, task: int, shard: ShardWriter, scratch: Path) -> None:
        self._task, self._shard = task, shard
        self.scratch = scratch  #: folder for what is needed on the way
        self.rows: list[dict[str, Any]] = []
        self.ledger: list[LedgerRow] = []

    def add_media(
        self, plan_row: int, item: Mapping[str, Any], members: Mapping[str, bytes], columns: dict[str, Any]
    ) -> None:
        places = self._shard.add(item["key"], members)
        offset, size = next(iter(places.values()))
        columns = {**columns, "frame_offset": [offset + place for place in columns["frame_offset"]]}
        place = {"offset": offset, "size": size, "shard": self._task, "split": item["split"]}
        self.rows.append({**columns, **place, PLAN_ROW.name: plan_row})

    def add_dialogue(self, plan_row: int, item: Mapping[str, Any], media: list[int], keys: list[str]) -> None:
        texts = {name: item[name] for name in ("key", "id", "entry", "split")}
        turns, meta = json.loads(item["conversations"]), json.loads(item["meta"])
        self._shard.add(item["key"], {"json": dialogue_metadata(**texts, media=keys, conversations=turns, meta=meta)})
        columns = {name: item[name] for name in DIALOGUE_SCHEMA.names}
        self.rows.append({**columns, "media": media, PLAN_ROW.name: plan_row})

    def leave_out(
        self, job: BuildJob, item: Mapping[str, Any], reason: str, message: str, kind: str = "media", attempts: int = 1
    ) -> None:
        entry, key, source = job.entries[item["entry"]], item["key"], item["source"]
        attempts += item["attempts"]
        self.ledger.append(LedgerRow(entry, kind, reason, message, key=key, source=source, attempts=attempts))

    def leave_out_dialogue(self, item: Mapping[str, Any], reason: str, message: str) -> None:
        texts = {"dialogue": item["id"], "key": item["key"], "source": item["source"]}
        self.ledger.append(LedgerRow(item["entry"], "dialogue", reason, message, **texts))


@contextlib.contextmanager
def _result(job: BuildJob, task: int) -> Iterator[_Result]:
    """Gather the results of a task; its folder appears when the block ends."""
    final = task_folder(job.work, job.tasks[task])
    scratch = final.with_name(f"{final.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    with ShardWriter(scratch / "shard.tar") as shard:
        result = _Result(task, shard, scratch)
        yield result
    schema = DIALOGUE_SCHEMA if is_dialogue(final.name) else media_schema(job.compat)
    write_table(scratch / "rows.arrow", build_table(schema.append(PLAN_ROW), result.rows))
    write_table(scratch / "ledger.arrow", ledger_table(result.ledger))
    if shard.samples:
        write_atomic(scratch / "shard.json", canonical_json(dataclasses.asdict(shard.info)).encode())
    try:
        os.rename(scratch, final)
    except OSError:
        if not final.is_dir():  # else a worker of a build that was killed got there first, with the same bytes
            raise
        shutil.rmtree(scratch)
    fsync_path(final.parent)


# Media ----------------------------------------------------------------------------------------------------------------


def _build(
    job: BuildJob, path: Path, item: Mapping[str, Any], dialogues: list[dict[str, Any]]
) -> tuple[dict[str, bytes], dict[str, Any], bool]:
    """Decode and encode one media item: members of its sample, its index columns (frame offsets from the member's
    start), and whether it was salvaged. Whatever goes wrong becomes an :class:`_Unbuilt`."""
    try:
        made = _make(job, path, item)
    except MediaError as error:
        local = path if job.places[item["entry"]].path else item["source"]  # fetched files have names of the moment
        raise _MediaBuildError(error.reason, str(error).replace(str(path), str(local))) from None
    except Exception as error:  # decoders are other people's code; one item must not end a build
        raise _MediaBuildError("crashed", _described(item, error)) from error
    columns = {**made.columns, "key": item["key"], "kind": item["kind"], "source": item["source"]}
    columns["sha256"] = hashlib.sha256(made.data).hexdigest()
    hidden = ("frame_offset", "frame_size", NOMINAL.name)
    facts = {name: value for name, value in columns.items() if name not in hidden}
    extension = "mp4" if item["kind"] == "video" else "jpg"
    json_member = media_metadata(**facts, salvaged=made.salvaged, dialogues=dialogues)
    return {extension: made.data, "json": json_member}, columns, made.salvaged


def _make(job: BuildJob, path: Path, item: Mapping[str, Any]) -> EncodedMedia:
    if item["kind"] == "image":
        return encode_image_file(path, job.images)
    seed, bounds = media_seed(job.seed, item["key"]), (item["start"], item["end"])
    return encode_video(path, item["reader"], *bounds, job.frames, seed, job.compat, item["split"], item["source"])
