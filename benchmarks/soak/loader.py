"""Ranks that read batches and are killed again and again, and whether any global batch changes.

    python -m benchmarks.soak.loader [--kills 20] [--seed 0] [--workers 2] [--copies 12]

Ranks, each a process with decoding workers, read a small root of videos, stills and text and note a digest of every
row, pixels included, and their loader's state after every global batch. They get SIGKILL at random moments: all
processes at once, the ranks alone, whose workers must end by themselves, or one worker, whose rank must end with one
line that names it. The next ranks, one, two or four of them, go on from the last state that all had noted, as from a
checkpoint. Exits with 1 if a row differs from those of one process that nobody disturbed, a global batch is missing,
or a worker outlives its rank.

Moments are drawn from the seed, as numbers of rows that come to be, which is progress on any machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from benchmarks.soak.errors import SoakError
from framestream.pipeline import Batch, build_loader, load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.loading.loader import LoaderError
from tests.helpers.corpora.small_root import manifest, mixed_root

EPOCHS = 2
PAUSE = 0.02  #: seconds that a rank takes for a row, as if it trained on it
PROGRESS = 25  #: rows that come to be before a kill, at most
PATIENCE = 60.0  #: seconds in which a worker without a parent must be gone, on however busy a machine

Row = tuple[int, int, int]  #: epoch, global batch, row of it


def row_digest(batch: Batch) -> str:
    """Of all that a row holds and that does not depend on the number of ranks."""
    found = hashlib.sha256(json.dumps([batch.keys, batch.total_weight, batch.skipped]).encode())
    for name in (*("input_ids", "labels", "position_ids", "cu_seqlens", "token_weight"), "visual_index"):
        found.update(getattr(batch, name).numpy())
    for pixels in (batch.clips, batch.image_tiles):
        found.update(repr(tuple(pixels.shape)).encode())
        found.update(pixels.numpy())
    return found.hexdigest()


def read(folder: Path, rank: int, world: int) -> None:
    """What one rank does: read on from ``folder``/state.json, and note every row."""
    loader = build_loader(load_manifest(folder / "manifest.yaml"), rank, world)
    if (folder / "state.json").exists():
        loader.load_state_dict(json.loads((folder / "state.json").read_bytes()))
    with open(folder / f"rank{rank}.jsonl", "w", encoding="utf-8") as notes:
        while loader.state_dict()["epoch"] < EPOCHS:
            for batch in loader:
                time.sleep(PAUSE)
                row = [batch.epoch, batch.step, batch.micro_step * world + rank]
                state = loader.state_dict() if batch.is_last else None
                print(json.dumps({"row": row, "digest": row_digest(batch), "state": state}), file=notes, flush=True)


class ReadingCampaign:
    """The root, what it holds, and the ranks that read it, in ``folder``."""

    def __init__(self, folder: Path, workers: int, copies: int) -> None:
        self._folder, self._workers = folder, workers
        made = manifest(mixed_root(folder / "root", copies), loader__workers=workers, loader__prefetch_mb=2)
        (folder / "manifest.yaml").write_text(yaml.safe_dump(to_dict(made)))
        self.kills: Counter[str] = Counter()
        self.worlds: Counter[int] = Counter()
        self.whole = self._undisturbed()

    def _undisturbed(self) -> dict[Row, str]:
        """Digest of every row, read by threads of this process."""
        loader = build_loader(load_manifest(self._folder / "manifest.yaml", ["loader.workers=0"]))
        batches = (batch for _ in range(EPOCHS) for batch in loader)
        return {(batch.epoch, batch.step, batch.micro_step): row_digest(batch) for batch in batches}

    def run(self, seed: int, kills: int) -> int:
        """Read both epochs until ``kills`` are spent; returns how often they were read to the end."""
        draw, ended = random.Random(seed), 0
        while True:
            last = self.kills.total() >= kills
            self._read_once(draw, kills)
            ended += 1
            if last or self.kills.total() >= kills:
                return ended

    def _read_once(self, draw: random.Random, kills: int) -> None:
        """From the first batch to the last, through all kills that fall into it."""
        (self._folder / "state.json").unlink(missing_ok=True)
        seen: dict[Row, str] = {}
        world, state = 2, None
        while state is None or state["epoch"] < EPOCHS:
            kill = self.kills.total() < kills
            self._disturbed(world, draw) if kill else self._finished(world)
            rows, states = zip(*(self._notes(rank) for rank in range(world)), strict=True)
            for row, found in (pair for noted in rows for pair in noted):
                if self.whole.get(row) != found:
                    raise SoakError(f"row {row} read by {world} ranks differs from that of the undisturbed process")
                seen[row] = found
            state = min((s or state or {"epoch": 0, "step": 0} for s in states), key=lambda s: (s["epoch"], s["step"]))
            if "fingerprint" in state:
                (self._folder / "state.json").write_text(json.dumps(state))
            self.worlds[world] += 1
            world = draw.choice((1, 2, 2, 4))
        if missing := self.whole.keys() - seen.keys():
            raise SoakError(f"{len(missing)} rows were never read: {sorted(missing)[:5]}")

    def _notes(self, rank: int) -> tuple[list[tuple[Row, str]], dict | None]:
        """The rows that a rank noted, and its last state; a line that was cut by the kill is none."""
        path = self._folder / f"rank{rank}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        notes = [json.loads(line) for line in lines]
        states = [note["state"] for note in notes if note["state"]]
        return [(tuple(note["row"]), note["digest"]) for note in notes], states[-1] if states else None

    def _start(self, world: int) -> list[subprocess.Popen]:
        for path in self._folder.glob("rank*.jsonl"):
            path.unlink()
        command = [sys.executable, "-m", "benchmarks.soak.loader", "--folder", str(self._folder), "--rank"]
        ranks = []
        for rank in range(world):
            with open(self._folder / f"rank{rank}.err", "w", encoding="utf-8") as said:
                ranks.append(subprocess.Popen([*command, str(rank), str(world)], stderr=said))
        return ranks

    def _said(self, rank: int) -> str:
        return (self._folder / f"rank{rank}.err").read_text(encoding="utf-8")[-2000:]

    def _finished(self, world: int) -> None:
        ranks = self._start(world)
        for number, rank in enumerate(ranks):
            if rank.wait():
                raise SoakError(f"rank {number} of {world} ended with {rank.returncode}: {self._said(number)}")

    def _disturbed(self, world: int, draw: random.Random) -> None:
        """Start ranks and kill something of them after some rows; all are gone when it returns."""
        ranks = self._start(world)
        rows, kind = draw.randint(1, PROGRESS), draw.choice(("all", "ranks", "one worker"))
        while sum(len(self._notes(rank)[0]) for rank in range(world)) < rows and any(r.poll() is None for r in ranks):
            time.sleep(0.01)
        begun = {worker: rank for rank in ranks if rank.poll() is None for worker in worker_processes(rank.pid)}
        if begun:
            victim = draw.choice(sorted(begun))
            self._kill(kind, ranks, begun, victim)
            self.kills[kind] += 1
        for rank in ranks:
            rank.wait()
        until = time.monotonic() + PATIENCE
        while left := [worker for worker in begun if Path(f"/proc/{worker}").exists()]:
            if time.monotonic() > until:
                raise SoakError(f"workers {left} outlive their ranks by {PATIENCE:g} s")
            time.sleep(0.01)

    def _kill(self, kind: str, ranks: list[subprocess.Popen], begun: dict[int, subprocess.Popen], victim: int) -> None:
        if kind == "one worker":
            os.kill(victim, signal.SIGKILL)
            status, said = begun[victim].wait(), self._said(ranks.index(begun[victim]))
            if status and f"(process {victim}) was ended by SIGKILL" not in said:
                raise SoakError(f"the rank of a killed worker ended with {status}: {said}")
        for process in [*(begun if kind == "all" else ()), *(rank.pid for rank in ranks if rank.poll() is None)]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def worker_processes(rank: int) -> list[int]:
    """Process numbers of a rank's decoding workers."""
    try:
        children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
        return [
            int(child)
            for child in children
            if b"framestream.pipeline.loading.decode_worker" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    except OSError:  # it ended meanwhile
        return []


def main() -> int:
    """Run a campaign and print its figures, or read as one of its ranks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of each rank")
    parser.add_argument("--copies", type=int, default=12, help="dialogues of each of the seven kinds")
    parser.add_argument("--folder", type=Path, help="for the files, 1 MB; a temporary one")
    parser.add_argument("--rank", type=int, nargs=2, metavar=("RANK", "WORLD"), help="read as this rank (internal)")
    options = parser.parse_args()
    if options.rank:
        try:
            read(options.folder, *options.rank)
        except LoaderError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        campaign = ReadingCampaign(Path(name), options.workers, options.copies)
        try:
            ended = campaign.run(options.seed, options.kills)
        except SoakError as error:
            print(f"error: seed {options.seed}, {dict(campaign.kills)} kills: {error}", file=sys.stderr)
            return 1
    print(f"seed {options.seed}: SIGKILL of {dict(campaign.kills)} while {EPOCHS} epochs were read {ended} times")
    print(f"starts by number of ranks: {dict(sorted(campaign.worlds.items()))}, {options.workers} workers each")
    print(f"{len(campaign.whole)} rows, each time the same ones; no worker outlived its rank")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
