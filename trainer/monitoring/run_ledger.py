"""The ledger of a run: every dialogue that was left out of training, or lost its end, and why.

``RUN/ledger/rank000.jsonl`` and so on, one file for each rank, so that no two processes write to one. A line is a row
of :mod:`framestream.pipeline.shards.ledger` with ``epoch`` and ``step`` (the global batch; null for dialogues that no epoch contains).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from framestream.pipeline.shards.ledger import LedgerRow


class RunLedger:
    """The file of one of ``world`` ranks below ``run``; made when there is something to say.

    Files of ranks that an earlier start had and this one has not are kept straight by rank number modulo ``world``.
    """

    def __init__(self, run: Path, rank: int, world: int) -> None:
        self.folder = run / "ledger"
        self._path = self.folder / f"rank{rank:03d}.jsonl"
        self._rank, self._world = rank, world

    def start(self, left_out: Iterable[tuple[str, str]] = (), cut: Iterable[tuple[str, str]] = ()) -> None:
        """Start anew with the dialogues that are ``left_out`` of, or ``cut`` in, every epoch, as (key, reason)."""
        for path in self._own():
            path.unlink()
        self._write("unusable", left_out, None, None)
        self._write("cut", cut, None, None)

    def resume(self, state: Mapping[str, int]) -> None:
        """Drop the lines of global batches from the loader's ``state`` on, which will be read again."""
        for path in self._own():
            kept = [row for row in _rows(path) if row["epoch"] is None or _place(row) < _place(state)]
            part = path.with_suffix(".part")
            part.write_text("".join(map(_line, kept)), encoding="utf-8")
            os.replace(part, path)

    def record(self, skipped: Iterable[tuple[str, str]], epoch: int, step: int) -> None:
        """Dialogues, as (key, reason), that could not be read for a global batch."""
        self._write("unreadable", skipped, epoch, step)

    def not_finite(self, dialogues: Iterable[tuple[str, str]], epoch: int, step: int) -> None:
        """Dialogues, as (key, reason), for which a global batch was not learned."""
        self._write("not_finite", dialogues, epoch, step)

    def _own(self) -> list[Path]:
        paths = sorted(self.folder.glob("rank*.jsonl"))
        return [path for path in paths if int(path.stem.removeprefix("rank")) % self._world == self._rank]

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
    """How many global batches before the loader's ``state`` were not finite, on whatever rank."""
    rows = (row for row in read_run_ledger(run) if row["reason"] == "not_finite")
    return len({_place(row) for row in rows if _place(row) < _place(state)})


def read_run_ledger(run: Path) -> Iterator[dict]:
    """All rows of a run's ledger; a line that a killed process left torn is none."""
    for path in sorted((run / "ledger").glob("rank*.jsonl")):
        yield from _rows(path)


def _rows(path: Path) -> Iterator[dict]:
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def _line(row: Mapping) -> str:
    return json.dumps(row) + "\n"


def _place(row: Mapping[str, int]) -> tuple[int, int]:
    return row["epoch"], row["step"]
