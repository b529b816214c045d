"""Kill four stages of training repeatedly and compare the results with a run without kills.

    python -m benchmarks.soak.train [--kills 25] [--seed 0] [--steps 12]

A small model is trained in four stages like the demo's, each initialized from the one before. The first run is on two
ranks without interruption. Later runs receive SIGKILL at random moments. It ends one random rank, whose launcher ends
the others, or all processes at once. The same command is then started again. The first half of the kills is on two
ranks, the rest on one, two or four. After every kill, ``latest`` must name a complete checkpoint or not exist.

Exits with 1 if ``latest`` names an incomplete checkpoint, if a global batch of a stage has other dialogues than without
kills, or if losses or final weights differ. On two ranks they must be equal bit for bit. On other numbers of ranks,
where sums have another order, losses must agree within ``TOLERANCE``.

The moments of kills come from the seed, as a number of logged optimizer steps and a fraction of a second.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open

from benchmarks.soak.errors import SoakError
from framestream.trainer.checkpoint.state import CheckpointError, latest_checkpoint, read_state
from tests.helpers.corpora import training_corpus as corpus

STAGES = (1, 2, 3, 4)
SAVE_EVERY = 3
PROGRESS = 5  #: maximum number of steps logged before a kill
TOLERANCE = 5e-4  #: relative difference of losses on different numbers of ranks


def overrides(stage: int, steps: int) -> dict:
    """Return the fields that make the small corpus's manifest stage ``stage`` of the recipe."""
    tower, connector, language = stage > 1, True, stage in (2, 3)
    parts = (("vision_tower", tower, 1e-3), ("connector", connector, 3e-3), ("language_model", language, 2e-3))
    train = {name: {"train": on, "lr": lr if on else 0, "weight_decay": 0.01 * stage} for name, on, lr in parts}
    rest = {"dtype": "fp32", "persistence_threshold": 0, "epochs": 20, "max_steps": steps, "save_every": SAVE_EVERY}
    sampler = "middle" if stage == 1 else "dynamic_fps1"
    frames = {"sampler": sampler, "min": 4, "max": 4 if stage == 1 else 8, "size": 160 if stage == 4 else 128}
    images = {"mode": "square"} if stage == 1 else {"max_grid": 2}
    weight = "token" if stage == 1 else "dialogue"
    batching = {"global_batch": 6, "row_multiple": 4, "loss_weight": weight}
    return {"train": {**train, **rest}, "frames": frames, "images": images, "batching": batching}


class TrainingCampaign:
    """Shards and manifests of consecutive ``stages``, and runs of them, below ``folder``."""

    def __init__(self, folder: Path, steps: int, rng: random.Random, stages: tuple[int, ...] = STAGES) -> None:
        self._folder, self._rng, self._stages = folder, rng, stages
        self._manifests = {n: corpus.make(folder / f"data{n}", stage=n, **overrides(n, steps)) for n in stages}
        self.kills: Counter[str] = Counter()
        self.worlds: Counter[int] = Counter()
        self.resumed = 0  #: starts that resumed from a checkpoint
        self.difference = 0.0  #: largest relative difference of a loss on other numbers of ranks
        for stage in stages:
            self._start("straight", stage, 2).wait()
            self._check_finished("straight", stage)

    def run(self, kills: int) -> int:
        """Run all stages until there were ``kills`` kills, half of them on two ranks; return the number of passes."""
        passes = 0
        for worlds, until in (((2,), (kills + 1) // 2), ((1, 2, 4), kills)):
            while self.kills.total() < until:
                for number, stage in enumerate(self._stages):
                    share = (until - self.kills.total()) // (len(self._stages) - number)
                    self._run_stage(f"pass{passes}", stage, worlds, self.kills.total() + share)
                passes += 1
        return passes

    def _run_stage(self, name: str, stage: int, worlds: tuple[int, ...], until: int) -> None:
        """Run one stage from its beginning to its end, and kill it until the total of kills is ``until``."""
        run, only_two = self._run(name, stage), worlds == (2,)
        while not (run / "final").exists():
            self.resumed += self._has_checkpoint(run)
            process = self._start(name, stage, self._rng.choice(worlds))
            if self.kills.total() < until:
                self._kill_some(run, process)
            output = process.communicate()[0]
            if process.returncode == 0 and not (run / "final").exists():
                raise SoakError(f"{run}: ended without final weights: {output[-2000:]}")
            if process.returncode not in (0, 1, -signal.SIGKILL):
                raise SoakError(f"{run}: exit status {process.returncode}: {output[-2000:]}")
            errors = [line for line in output.splitlines() if line.startswith("error: ")]
            if errors := [line for line in errors if "lost another rank" not in line]:  # the one that was killed
                raise SoakError(f"{run}: {errors[0]}")
        self._check_finished(name, stage)
        self._compare(name, stage, exact=only_two)

    def _has_checkpoint(self, run: Path) -> bool:
        """Return whether ``latest`` names a checkpoint; raise SoakError if that is incomplete."""
        try:
            folder = latest_checkpoint(run)
            return folder is not None and bool(read_state(folder))
        except CheckpointError as error:
            raise SoakError(f"an incomplete checkpoint: {error}") from error

    def _kill_some(self, run: Path, process: subprocess.Popen) -> None:
        """Kill one rank or all processes some steps from now, unless the run ends before."""
        target, wait = logged(run) + self._rng.randint(0, PROGRESS), self._rng.uniform(0, 1)
        kind = self._rng.choice(("one rank", "one rank", "all"))
        while process.poll() is None and not (logged(run) >= target and ranks(process.pid)):
            time.sleep(0.02)
        time.sleep(wait)
        victims = ranks(process.pid)
        if process.poll() is not None or not victims:
            return
        if kind == "all":
            corpus.kill(process)
        else:
            _kill(self._rng.choice(victims))
        self.kills[kind] += 1

    def _run(self, name: str, stage: int) -> Path:
        return self._folder / name / f"stage{stage}"

    def _start(self, name: str, stage: int, world: int) -> subprocess.Popen:
        sets = [f"output={self._run(name, stage)}"]
        if stage > self._stages[0]:
            before = self._run(name, stage - 1)
            sets.append(f"init_from={{run: {before}, vision_tower: '', connector: '', language_model: ''}}")
        self.worlds[world] += 1
        return subprocess.Popen(
            corpus.train_command(self._manifests[stage], world, *sets),
            env=corpus.environment(),
            cwd=corpus.PROJECT,
            start_new_session=True,
            stdout=subprocess.PIPE if name != "straight" else subprocess.DEVNULL,
            stderr=subprocess.STDOUT if name != "straight" else subprocess.DEVNULL,
            text=True,
        )

    def _check_finished(self, name: str, stage: int) -> None:
        run = self._run(name, stage)
        if not (run / "final").exists():
            raise SoakError(f"{run}: has no final weights")
        if left := [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(("part", "univ"))]:
            raise SoakError(f"{run}: left behind: {left}")

    def _compare(self, name: str, stage: int, exact: bool) -> None:
        ours, straight = (corpus.log(self._run(which, stage)) for which in (name, "straight"))
        run = self._run(name, stage)
        if [(r["step"], r["batch"]) for r in ours] != [(r["step"], r["batch"]) for r in straight]:
            raise SoakError(f"{run}: consumed other dialogues than the run without kills")
        losses = [(r["loss"], s["loss"]) for r, s in zip(ours, straight, strict=True)]
        difference = max(abs(loss - other) / other for loss, other in losses)
        if exact and (difference or any(not same for same in self._weights_agree(name, stage))):
            raise SoakError(f"{run}: losses or final weights differ from the run without kills, by {difference:g}")
        self.difference = max(self.difference, difference)
        if difference > TOLERANCE:
            raise SoakError(f"{run}: a loss differs by {difference:.2g}, more than {TOLERANCE}")

    def _weights_agree(self, name: str, stage: int) -> Iterator[bool]:
        folders = [self._run(which, stage) / "final" for which in (name, "straight")]
        for path in sorted(folders[1].glob("*.safetensors")):
            with safe_open(folders[0] / path.name, "pt") as ours, safe_open(path, "pt") as theirs:
                yield sorted(ours.keys()) == sorted(theirs.keys())
                yield from (ours.get_tensor(key).equal(theirs.get_tensor(key)) for key in theirs.keys())  # noqa: SIM118


def logged(run: Path) -> int:
    """Return the number of optimizer steps in a run's log."""
    path = run / "log.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def ranks(launcher: int) -> list[int]:
    """Return the process ids of the ranks that torchrun ``launcher`` started."""
    found = []
    try:
        for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
            if b"\0RANK=" in b"\0" + Path(f"/proc/{child}/environ").read_bytes():
                found.append(int(child))
    except OSError:  # a process ended meanwhile
        return []
    return found


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> int:
    """Run a campaign and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps of a stage")
    parser.add_argument("--folder", type=Path, help="folder for the files, 100 MB; default: a temporary one")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        try:
            campaign = TrainingCampaign(Path(name), options.steps, random.Random(options.seed))
            passes = campaign.run(options.kills)
        except SoakError as error:
            print(f"error: seed {options.seed}: {error}", file=sys.stderr)
            return 1
    kills, worlds = json.dumps(dict(campaign.kills)), json.dumps(dict(sorted(campaign.worlds.items())))
    stages = f"{len(STAGES)} stages of {options.steps} steps"
    print(f"seed {options.seed}: SIGKILL {kills} while {stages} ran {passes} times")
    print(f"starts by number of ranks: {worlds}; {campaign.resumed} went on from a checkpoint, each of them whole")
    print("dialogues of every global batch as without kills; on two ranks every loss and weight bit for bit,")
    print(f"on other numbers of ranks losses within {campaign.difference:.1e}")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
