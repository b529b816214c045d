"""Run the project's commands inside this process, and read what they wrote."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from benchmarks.fuzz.target import CommandError, Reading, digest_of
from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from framestream.tools.builder import executors
from framestream.tools.builder.executors import Counts, Executor
from framestream.tools.builder.task import BuildJob, make_worker
from framestream.tools.common.errors import WorkerError


def call_main(main: Callable[[Sequence[str]], int], *arguments: str, accepted: int = 0) -> None:
    """Run the ``main`` of a command.

    Raises:
        CommandError: it ended with another status than 0 or ``accepted``; the message has all output of this process.
    """
    try:
        status = main(arguments)
    except SystemExit as exit_request:
        status = exit_request.code if isinstance(exit_request.code, int) else 1
    if status not in (0, accepted):
        raise CommandError(f"status {status}: {printed()}")


def printed() -> str:
    """Return what this process wrote to its standard error, if that is a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    size = os.fstat(2).st_size
    return os.pread(2, size, 0).decode(errors="replace").strip() if size else ""


def use_this_process() -> None:
    """Let builds run their tasks in this process, so that their exceptions are seen here."""
    executors.local = lambda workers: run_in_process  # type: ignore[assignment]


def run_in_process(job: BuildJob, tasks: Sequence[int]) -> Iterator[Counts]:
    """Run tasks one after the other; as in a worker process, errors of files end the build with one line."""
    work = make_worker(job)
    for task in tasks:
        try:
            work(task, {}, False, lambda *report: None)
        except OSError as error:
            raise WorkerError(f"a worker failed: {type(error).__name__}: {error}") from None
        yield {"media": 1}


def run_until(count: int) -> Executor:
    """Make an executor that is stopped after ``count`` tasks, as by a kill."""

    def run(job: BuildJob, tasks: Sequence[int]) -> Iterator[Counts]:
        yield from run_in_process(job, tasks[:count])
        raise WorkerError("stopped")

    return run


def read_root(root: str | Path) -> Reading:
    """Read what a finished root contains: media and dialogues by name, and what its ledger says is left out."""
    root = Path(root)
    index = Index.open(root)
    items: dict[str, str] = {}
    sources = index.media["source"].to_pylist()
    shards = [root / row["folder"] / row["name"] for row in index.shards.to_pylist()]
    for row in index.media.to_pylist():
        with open(shards[row["shard"]], "rb") as shard:
            shard.seek(row["offset"])
            items[media_name(row)] = digest_of(shard.read(row["size"]), str(row["timestamps"]))
    for row in index.dialogues.to_pylist():
        about = [sources[number] for number in row["media"]]
        items[f"dialogue {row['entry']} {row['id']}"] = digest_of(row["conversations"], str(about), row["meta"])
    left_out = {}
    for row in read_ledger(root).to_pylist():
        name = f"dialogue {row['entry']} {row['dialogue']}" if row["kind"] == "dialogue" else media_name(row)
        left_out[name] = f"{row['reason']}: {row['source']}: {row['message']}"
    return Reading(items, left_out)


def media_name(row: dict[str, Any]) -> str:
    """Name a media item of an index or of a ledger."""
    return f"media {row['source']} {row['key']}"


def table_digest(table: pa.Table) -> str:
    """Return a digest of all values of a table."""
    return digest_of(str(table.to_pylist()))
