"""Measure how many questions a second ``trainer.evaluate`` answers with one process and with several.

    python -m benchmarks.model.scoring [--ranks 2] [--videos 40] [--rounds 3] [--folder DIR]

A small model with random weights is asked about small videos, read from their files. Each process has one thread and a
core. Every run is made with few questions and with all: the difference of the times has no start in it. One process,
several that share the questions, and as many that know nothing of each other and answer all of them take turns. The
last are what the machine allows: cores share memory and its bus. The ratios are those of the medians. The results must
be the same, byte for byte. Leave the machine idle: the ratios are of times.
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


def score(manifest: Path, ranks: int, limit: int, copies: int = 1) -> tuple[float, bytes]:
    """Run the command with ``ranks`` processes, ``copies`` times at once; return seconds and the bytes of a result."""
    folder = manifest.parent
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    words = ["--manifest", str(manifest), "--annotations", str(folder / "val.json"), "--root", str(folder / "media")]
    words += ["--limit", str(limit), "--set", "evaluate.batch=4"]
    cores, commands = sorted(os.sched_getaffinity(0)), []
    for copy in range(copies):
        pinned = ["taskset", "-c", ",".join(map(str, cores[copy * ranks : (copy + 1) * ranks]))]
        out = ["--out", str(folder / f"evaluation-{copy}.json")]
        commands.append([*pinned, *launcher, "-m", "trainer.evaluate", *words, *out])
    settings = {"env": training_corpus.environment(), "cwd": training_corpus.PROJECT, "stdout": subprocess.DEVNULL}
    started = time.perf_counter()
    running = [subprocess.Popen(command, **settings) for command in commands]
    if any([process.wait() for process in running]):
        raise SystemExit("error: trainer.evaluate failed; its message is above")
    return time.perf_counter() - started, (folder / "evaluation-0.json").read_bytes()


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
        ways = {"one process": (1, 1), f"{options.ranks} ranks": (options.ranks, 1), "separate": (1, options.ranks)}
        rates: dict[str, list[float]] = {name: [] for name in ways}
        results = set()
        for name in list(ways) * options.rounds:
            ranks, copies = ways[name]
            few, first = score(manifest, ranks, 2, copies)
            full, result = score(manifest, ranks, 10**6, copies)
            asked = copies * (len(json.loads(result)["answers"]) - len(json.loads(first)["answers"]))
            rates[name].append(asked / (full - few))
            results.add(result)
            print(f"{name}: {asked} questions in {full - few:.1f} s, {rates[name][-1]:.2f} a second", flush=True)
    finally:
        shutil.rmtree(folder)
    one, shared, separate = (statistics.median(found) for found in rates.values())
    print(f"{options.ranks} ranks over one process: {shared / one:.2f}; separate processes: {separate / one:.2f}")
    print(f"the same results: {len(results) == 1}; load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
