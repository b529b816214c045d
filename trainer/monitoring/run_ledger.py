"""The ledger of a run: every dialogue that was excluded from training or truncated, and the reason.

Each rank writes a file of its own: ``RUN/ledger/rank000.jsonl`` and so on. A line is a row of
:mod:`framestream.pipeline.shards.ledger` with ``epoch`` and ``step``, the number of the global batch. Both are null for
dialogues that no epoch contains.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from framestream.pipeline.shards.ledger import LedgerRow
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.records import read_json_lines

logger = logging.getLogger(__name__)


class RunLedger:
    """The file of one of ``world`` ranks below ``run``, created with its first row.

    A run may be resumed on fewer ranks. Rank r then maintains all files whose number modulo ``world`` is r.
    """

    def __init__(self, run: Path, rank: int, world: int) -> None:
        self.folder = run / "ledger"
        self._path = self.folder / f"rank{rank:03d}.jsonl"
        self._rank, self._world = rank, world

    def start(self, excluded: Iterable[tuple[str, str]] = (), truncated: Iterable[tuple[str, str]] = ()) -> None:
        """Start an empty ledger with the dialogues ``excluded`` or ``truncated`` in every epoch, as (key, reason)."""
        for path in self._own():
            path.unlink()
        self._write("unusable", excluded, None, None)
        self._write("cut", truncated, None, None)

    def resume(self, state: Mapping[str, int]) -> None:
        """Drop the rows of global batches from the loader's ``state`` on, because the run repeats them."""
        for path in self._own():
            rows = [row for row in _rows(path) if row["epoch"] is None or _position(row) < _position(state)]
            write_atomic(path, "".join(map(_line, rows)).encode())

    def record(self, skipped: Iterable[tuple[str, str]], epoch: int | None, step: int | None) -> None:
        """Record dialogues of a global batch, None for those of a validation, that could not be read: (key, reason)."""
        self._write("unreadable", skipped, epoch, step)

    def not_finite(self, dialogues: Iterable[tuple[str, str]], epoch: int, step: int) -> None:
        """Record dialogues that caused the step of a global batch to be skipped, as (key, reason)."""
        self._write("not_finite", dialogues, epoch, step)

    def _own(self) -> list[Path]:
        paths = sorted(self.folder.glob("rank*.jsonl"))
        numbers = [re.fullmatch(r"rank([0-9]{1,9})", path.stem) for path in paths]
        return [
            path
            for path, number in zip(paths, numbers, strict=True)
            if number and int(number[1]) % self._world == self._rank
        ]

    def _write(self, reason: str, dialogues: Iterable[tuple[str, str]], epoch: int | None, step: int | None) -> None:
        with contextlib.ExitStack() as stack:
            file = None
            for key, message in dialogues:
                if file is None:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(open(self._path, "a", encoding="utf-8"))
                row = LedgerRow(entry="", kind="dialogue", reason=reason, message=message, key=key)
                file.write(_line({**row.columns(), "epoch": epoch, "step": step}))


def not_finite_before(run: Path, state: Mapping[str, int]) -> int:
    """Return the number of global batches before the loader's ``state`` that were not finite on any rank."""
    rows = (row for row in read_run_ledger(run) if row["reason"] == "not_finite" and row["epoch"] is not None)
    return len({_position(row) for row in rows if _position(row) < _position(state)})


def read_run_ledger(run: Path) -> Iterator[dict]:
    """Yield all rows of a run's ledger. Skips the incomplete line of a killed process, and logs damaged lines."""
    for path in sorted((run / "ledger").glob("rank*.jsonl")):
        yield from _rows(path)


def _rows(path: Path) -> Iterator[dict]:
    for number, _, row in read_json_lines(path):
        if _is_row(row):
            yield row
        else:
            logger.warning("%s: line %d is damaged and is left out", path, number)


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("key", "reason", "message")):
        return False
    position = [row.get("epoch", ""), row.get("step", "")]
    return position == [None, None] or all(type(number) is int and number >= 0 for number in position)


def _line(row: Mapping) -> str:
    return json.dumps(row) + "\n"


def _position(row: Mapping[str, int]) -> tuple[int, int]:
    return row["epoch"], row["step"]
