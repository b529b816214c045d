"""The commands of docs/recipe.md in a folder of their own, against local servers in place of the hub."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from benchmarks.rehearsal.hub import count_selected, published_entries
from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.ledger import read_ledger
from tests.helpers.paths import BUILD_SHARDS, ROOT, VERIFY_SHARDS

LIMIT = 800  #: seconds of a command
SHOWN = 4000  #: characters of the output of a command that failed


class RehearsalError(Exception):
    """What a person at the cluster would have met: a command that failed, or a result that is not as planned."""


@dataclass
class Stage:
    """Run the commands of the recipe in ``folder``, and note how long each took.

    Attributes:
        folder: current folder of all commands: ``runs``, ``shards`` and ``roots.yaml`` are in it.
        data_endpoint: of the hub's data sets, for builds.
        weight_endpoint: of the hub's models, for training.
        sets: assignments of all training commands: width and depth.
        ranks: processes of a training; with 1, no launcher is used.
        skip: whether entries that the hub does not have are left out.
    """

    folder: Path
    data_endpoint: str
    weight_endpoint: str
    sets: Sequence[str]
    ranks: int = 2
    skip: bool = False
    seconds: list[tuple[str, float]] = field(default_factory=list)

    def run(self, name: str, *command: object, endpoint: str = "", **environment: str) -> str:
        """Run a command to its end and return its output.

        Raises:
            RehearsalError: its status is not 0, or it printed a traceback or an error.
        """
        started = time.perf_counter()
        done = subprocess.run(
            [str(word) for word in command],
            cwd=self.folder,
            env=self._environment() | {"HF_ENDPOINT": endpoint or self.weight_endpoint} | environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        self.seconds.append((name, time.perf_counter() - started))
        print(f"{self.seconds[-1][1]:7.1f} s  {name}", flush=True)
        if done.returncode or "Traceback" in done.stderr:
            text = f"{done.stdout[-SHOWN:]}\n{done.stderr[-SHOWN:]}"
            raise RehearsalError(f"{name}: status {done.returncode}: {' '.join(map(str, command))}\n{text}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        kept = {name: text for name, text in os.environ.items() if not re.match("HF_|.*proxy", name, re.IGNORECASE)}
        own = {"HF_HOME": f"{self.folder}/hf", "XDG_CACHE_HOME": f"{self.folder}/cache", "PYTHONPATH": str(ROOT)}
        own |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        return kept | own | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def fetch_weights(self, repository: str, *files: str) -> None:
        """Download a repository, or files of it, before training."""
        self.run(f"hf download {repository}", "hf", "download", repository, *files)

    def build(self, stage: int, counts: dict[str, int]) -> None:
        """Plan, build and verify the shards of a stage, and compare them with the number of published samples."""
        entries = [e for found in published_entries([stage]).values() for e in found if e.annotation in counts]
        command = [sys.executable, BUILD_SHARDS, "--stage", stage, "--set", "data.roots=roots.yaml"]
        report = f"plan{stage}"
        if not self.skip:
            self.run(f"stage {stage}: plan", *command, "--dry-run", "--report", report, endpoint=self.data_endpoint)
            self._check_plan(report)
        more = ["--skip-unresolved"] * self.skip
        self.run(f"stage {stage}: build", *command, *more, "--workers", "2", endpoint=self.data_endpoint)
        root = self.folder / "shards" / f"stage{stage}"
        expected = sum(count_selected(entry, counts[entry.annotation]) for entry in entries)
        built = Index.open(root).dialogues.num_rows
        lost = [row for row in read_ledger(root).to_pylist() if row["kind"] != "entry"]
        if built != expected or lost:
            raise RehearsalError(f"{root}: {built} dialogues of {expected}; left out: {lost[:5]}")
        if not self.skip:
            self.run(f"stage {stage}: verify", sys.executable, VERIFY_SHARDS, root)

    def _check_plan(self, report: str) -> None:
        """Check that a dry run found all annotation files and media."""
        rows = pq.read_table(self.folder / report / "plan.parquet").to_pylist()
        if faults := [row for row in rows if not row["resolved"] or row["found"] != row["media"] or row["problems"]]:
            raise RehearsalError(f"{report}: {len(faults)} of {len(rows)} entries are not found: {faults[:3]}")

    def train(self, stage: int, *assignments: str) -> None:
        """Describe and train a stage, and check its log and what was and was not learned."""
        sets = [word for assignment in (*self.sets, *assignments) for word in ("--set", assignment)]
        offline = {"HF_HUB_OFFLINE": "1"} if not self.skip else {}
        arguments = ["-m", "trainer", "--manifest", f"stage{stage}", *sets]
        if not self.skip:
            self.run(f"stage {stage}: trainer --dry-run", sys.executable, *arguments, "--dry-run", **offline)
        launcher = ["torchrun", "--standalone", "--nproc_per_node", self.ranks] if self.ranks > 1 else [sys.executable]
        self.run(f"stage {stage}: train", *launcher, *arguments, **offline)
        lines = (self.folder / "runs" / f"stage{stage}" / "log.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        root = self.folder / "shards" / f"stage{stage}"
        if not records or not all(math.isfinite(r["loss"]) and r["skipped"] == 0 for r in records if "loss" in r):
            raise RehearsalError(f"stage {stage}: losses are not finite: {records[-3:]}")
        seen = sum(record.get("dialogues", 0) for record in records)
        if seen != Index.open(root).dialogues.num_rows:
            raise RehearsalError(f"stage {stage}: {seen} dialogues of {Index.open(root).dialogues.num_rows} were seen")

    def final_weights(self, stage: int) -> dict[str, torch.Tensor]:
        """Return the final weights of a stage by their published names."""
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted((self.folder / "runs" / f"stage{stage}" / "final").glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return tensors

    def check_learned(self, before: dict[str, torch.Tensor], after: dict[str, torch.Tensor], rested: str) -> None:
        """Check that the tensors whose names match ``rested`` are as before, and that others have changed."""
        changed = {name for name, value in after.items() if name in before and not torch.equal(before[name], value)}
        moved = sorted(name for name in changed if re.search(rested, name))
        if moved or not changed - set(moved):
            raise RehearsalError(f"frozen tensors changed: {moved[:3]}; {len(changed)} changed in all")
