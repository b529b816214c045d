"""Kill ranks that read batches repeatedly, and check that no global batch changes.

    python -m benchmarks.soak.loader [--kills 20] [--seed 0] [--workers 2] [--copies 12]

Each rank is a process with decoding workers. Ranks read a small root of videos, images and text. They record a digest
of every row, pixels included, and their loader's state after every global batch. SIGKILL is sent at random moments to
all processes at once, to the ranks alone, or to one worker. Workers of killed ranks must end by themselves. The rank of
a killed worker must end with one line that names it. One, two or four new ranks then resume from the last state that
all had recorded, as from a checkpoint.

Exits with 1 if a row differs from that of one process without kills, a global batch is missing, or a worker outlives
its rank.

The moments of kills come from the seed, as numbers of recorded rows, which measure progress on any machine.
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
PAUSE = 0.02  #: seconds of a rank for each row, in place of training
PROGRESS = 25  #: maximum number of recorded rows before a kill
PATIENCE = 60.0  #: seconds in which a worker without a parent must end, even on a busy machine

Row = tuple[int, int, int]  #: (epoch, global batch, row within it)


def row_digest(batch: Batch) -> str:
    """Return the digest of all contents of a row that do not depend on the number of ranks."""
    found = hashlib.sha256(json.dumps([batch.keys, batch.total_weight, batch.skipped]).encode())
    for name in (*("input_ids", "labels", "position_ids", "cu_seqlens", "token_weight"), "visual_index"):
        found.update(getattr(batch, name).numpy())
    for pixels in (batch.clips, batch.image_tiles):
        found.update(repr(tuple(pixels.shape)).encode())
        found.update(pixels.numpy())
    return found.hexdigest()


def read(folder: Path, rank: int, world: int) -> None:
    """Read as one rank: resume from ``folder``/state.json, and record every row."""
    loader = build_loader(load_manifest(folder / "manifest.yaml"), rank, world)
    if (folder / "state.json").exists():
        loader.load_state_dict(json.loads((folder / "state.json").read_bytes()))
    with open(folder / f"rank{rank}.jsonl", "w", encoding="utf-8") as records:
        while loader.state_dict()["epoch"] < EPOCHS:
            for batch in loader:
                time.sleep(PAUSE)
                row = [batch.epoch, batch.step, batch.micro_step * world + rank]
                state = loader.state_dict() if batch.is_last else None
                print(json.dumps({"row": row, "digest": row_digest(batch), "state": state}), file=records, flush=True)


class ReadingCampaign:
    """The root, the expected rows, and the ranks that read it, in ``folder``."""

    def __init__(self, folder: Path, workers: int, copies: int) -> None:
        self._folder, self._workers = folder, workers
        config = manifest(mixed_root(folder / "root", copies), loader__workers=workers, loader__prefetch_mb=2)
        (folder / "manifest.yaml").write_text(yaml.safe_dump(to_dict(config)))
        self.kills: Counter[str] = Counter()
        self.worlds: Counter[int] = Counter()
        self.expected = self._read_undisturbed()

    def _read_undisturbed(self) -> dict[Row, str]:
        """Return the digest of every row, read by threads of this process."""
        loader = build_loader(load_manifest(self._folder / "manifest.yaml", ["loader.workers=0"]))
        batches = (batch for _ in range(EPOCHS) for batch in loader)
        return {(batch.epoch, batch.step, batch.micro_step): row_digest(batch) for batch in batches}

    def run(self, seed: int, kills: int) -> int:
        """Read both epochs repeatedly until there were ``kills`` kills; return how often they were read to the end."""
        rng, ended = random.Random(seed), 0
        while True:
            last = self.kills.total() >= kills
            self._read_once(rng, kills)
            ended += 1
            if last or self.kills.total() >= kills:
                return ended

    def _read_once(self, rng: random.Random, kills: int) -> None:
        """Read from the first batch to the last, through all kills on the way."""
        (self._folder / "state.json").unlink(missing_ok=True)
        seen: dict[Row, str] = {}
        world, state = 2, None
        while state is None or state["epoch"] < EPOCHS:
            kill = self.kills.total() < kills
            self._read_with_kill(world, rng) if kill else self._read_to_end(world)
            rows, states = zip(*(self._records(rank) for rank in range(world)), strict=True)
            for row, found in (pair for recorded in rows for pair in recorded):
                if self.expected.get(row) != found:
                    raise SoakError(f"row {row} read by {world} ranks differs from that of the process without kills")
                seen[row] = found
            state = min((s or state or {"epoch": 0, "step": 0} for s in states), key=lambda s: (s["epoch"], s["step"]))
            if "fingerprint" in state:
                (self._folder / "state.json").write_text(json.dumps(state))
            self.worlds[world] += 1
            world = rng.choice((1, 2, 2, 4))
        if missing := self.expected.keys() - seen.keys():
            raise SoakError(f"{len(missing)} rows were never read: {sorted(missing)[:5]}")

    def _records(self, rank: int) -> tuple[list[tuple[Row, str]], dict | None]:
        """Return the rows that a rank recorded and its last state; ignore a line that the kill cut off."""
        path = self._folder / f"rank{rank}.jsonl"
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        records = [json.loads(line) for line in lines]
        states = [record["state"] for record in records if record["state"]]
        return [(tuple(record["row"]), record["digest"]) for record in records], states[-1] if states else None

    def _start(self, world: int) -> list[subprocess.Popen]:
        for path in self._folder.glob("rank*.jsonl"):
            path.unlink()
        command = [sys.executable, "-m", "benchmarks.soak.loader", "--folder", str(self._folder), "--rank"]
        ranks = []
        for rank in range(world):
            with open(self._folder / f"rank{rank}.err", "w", encoding="utf-8") as stderr:
                ranks.append(subprocess.Popen([*command, str(rank), str(world)], stderr=stderr))
        return ranks

    def _stderr(self, rank: int) -> str:
        return (self._folder / f"rank{rank}.err").read_text(encoding="utf-8")[-2000:]

    def _read_to_end(self, world: int) -> None:
        ranks = self._start(world)
        for number, rank in enumerate(ranks):
            if rank.wait():
                raise SoakError(f"rank {number} of {world} ended with {rank.returncode}: {self._stderr(number)}")

    def _read_with_kill(self, world: int, rng: random.Random) -> None:
        """Start ranks and kill some processes after some rows; return when all have ended."""
        ranks = self._start(world)
        rows, kind = rng.randint(1, PROGRESS), rng.choice(("all", "ranks", "one worker"))
        while sum(len(self._records(rank)[0]) for rank in range(world)) < rows and any(r.poll() is None for r in ranks):
            time.sleep(0.01)
        workers = {worker: rank for rank in ranks if rank.poll() is None for worker in worker_processes(rank.pid)}
        if workers:
            victim = rng.choice(sorted(workers))
            self._kill(kind, ranks, workers, victim)
            self.kills[kind] += 1
        for rank in ranks:
            rank.wait()
        until = time.monotonic() + PATIENCE
        while left := [worker for worker in workers if Path(f"/proc/{worker}").exists()]:
            if time.monotonic() > until:
                raise SoakError(f"workers {left} outlive their ranks by {PATIENCE:g} s")
            time.sleep(0.01)

    def _kill(
        self, kind: str, ranks: list[subprocess.Popen], workers: dict[int, subprocess.Popen], victim: int
    ) -> None:
        if kind == "one worker":
            os.kill(victim, signal.SIGKILL)
            status, stderr = workers[victim].wait(), self._stderr(ranks.index(workers[victim]))
            if status and f"(process {victim}) was ended by SIGKILL" not in stderr:
                raise SoakError(f"the rank of a killed worker ended with {status}: {stderr}")
        for process in [*(workers if kind == "all" else ()), *(rank.pid for rank in ranks if rank.poll() is None)]:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue


def worker_processes(rank: int) -> list[int]:
    """Return the process ids of a rank's decoding workers."""
    try:
        children = Path(f"/proc/{rank}/task/{rank}/children").read_text().split()
        return [
            int(child)
            for child in children
            if b"framestream.pipeline.loading.decode_worker" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
    except OSError:  # the rank ended meanwhile
        return []


def main() -> int:
    """Run a campaign and print its figures, or read as one of its ranks."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="decoding processes of each rank")
    parser.add_argument("--copies", type=int, default=12, help="dialogues of each of the seven kinds")
    parser.add_argument("--folder", type=Path, help="folder for the files, 1 MB; default: a temporary one")
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
    print(f"{len(campaign.expected)} rows, each time the same ones; no worker outlived its rank")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
