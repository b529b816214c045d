"""Measure how many questions a second ``trainer.evaluate`` answers with one process and with several.

    python -m benchmarks.model.scoring [--ranks 2] [--videos 40] [--rounds 3] [--folder DIR]

A small model with random weights is asked about small videos, read from their files. Each process has one thread, and
each run as many cores as processes. Every run is made with few questions and with all: the difference of the times has
no start in it. One process and several take turns, and the ratio is that of the medians. The results must be the same,
byte for byte. Leave the machine idle: the ratio is of times.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.helpers.corpora import training_corpus
from tests.helpers.model.weights import write_untrained_run


def score(manifest: Path, ranks: int, limit: int) -> tuple[float, bytes]:
    """Run the command with ``ranks`` processes; return its seconds and the bytes of its results."""
    folder, out = manifest.parent, manifest.parent / "evaluation.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words = ["--manifest", str(manifest), "--annotations", str(folder / "val.json"), "--root", str(folder / "media")]
    words += ["--out", str(out), "--limit", str(limit), "--set", "evaluate.batch=4"]
    cores = sorted(os.sched_getaffinity(0))[:ranks]
    pinned = ["taskset", "-c", ",".join(map(str, cores))]
    started = time.perf_counter()
    subprocess.run([*pinned, *launcher, "-m", "trainer.evaluate", *words], check=True, stdout=subprocess.DEVNULL,
                   env=training_corpus.environment(), cwd=training_corpus.PROJECT)  # fmt: skip
    return time.perf_counter() - started, out.read_bytes()


def main() -> None:
    """Make a model and questions, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the generated files; a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        manifest = write_untrained_run(folder, options.videos)
        rates: dict[int, list[float]] = {1: [], options.ranks: []}
        results = set()
        for ranks in list(rates) * options.rounds:
            few, first = score(manifest, ranks, 2)
            full, result = score(manifest, ranks, 10**6)
            asked = len(json.loads(result)["answers"]) - len(json.loads(first)["answers"])
            rates[ranks].append(asked / (full - few))
            results.add(result)
            print(f"{ranks} processes: {asked} questions in {full - few:.1f} s, {rates[ranks][-1]:.2f} a second")
    finally:
        shutil.rmtree(folder)
    one, several = (statistics.median(rates[ranks]) for ranks in (1, options.ranks))
    print(f"rate of {options.ranks} processes over that of one: {several / one:.2f}")
    print(f"the same results: {len(results) == 1}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
