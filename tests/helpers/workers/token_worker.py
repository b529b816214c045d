"""Make the rows of a small token cache, in processes that are killed or fail as told."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.tokenization import token_files
from framestream.pipeline.tokenization.token_files import SCHEMA

FINGERPRINT = "ab" * 16
ROWS = [
    {"ids": [5, -200, 7, 9], "labels": [-100, -100, -100, 9], "length": 67, "clips": 0, "tiles": 1, "learned": 1},
    {"ids": [3, 4], "labels": [-100, 4], "length": 2, "clips": 0, "tiles": 0, "learned": 1},
    {"ids": [], "labels": [], "length": 0, "clips": 0, "tiles": 0, "learned": 0},
]
ROWS = [row | {"error": "" if row["ids"] else "no answer"} for row in ROWS]


def tokenize(start: int, stop: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows one by one."""
    for row in range(start, stop):
        yield pa.RecordBatch.from_pylist(ROWS[row : row + 1], schema=SCHEMA)


class Recorder:
    """Writes the first dialogue of each call to a file. Kills its process, or fails, at one of them."""

    def __init__(self, log: Path, kill_at: int | None = None, fail_at: int | None = None) -> None:
        self.log, self.kill_at, self.fail_at = log, kill_at, fail_at

    def __call__(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        with open(self.log, "a") as log:
            print(start, file=log)
        if start == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if start == self.fail_at:
            raise ManifestError("text.tokenizer: is bad")
        return tokenize(start, stop)


def die_in_second_part(folder: str) -> None:
    """Write the tokens in this process, which is killed in the second part that it makes."""
    token_files.PART_ROWS = 1
    made = [row for row in range(len(ROWS)) if list(Path(folder).glob(f"*.{row:09d}-*.part"))]
    recorder = Recorder(Path(folder).parent / "log", kill_at=len(made) + 1)
    token_files.open_or_write_tokens([Path(folder)], FINGERPRINT, len(ROWS), recorder)
