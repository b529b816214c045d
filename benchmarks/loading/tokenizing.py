"""Measure how fast dialogues are tokenized on one core and on several, and what a kill costs.

    python -m benchmarks.loading.tokenizing [--dialogues 200000] [--cores 2] [--folder DIR]

The dialogues are those of ``benchmarks.loading.index``: a question about one of 20,000 videos and an answer of 45
tokens. Each run is a new process that may use the first cores of this machine, and opens the root without a token
cache. The last run is killed half-way and started again. All runs must leave the same file.

A rate in CPU seconds does not depend on other work on the machine. The ratio of two rates in seconds does, so leave the
machine idle.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from benchmarks.loading.index import generate_index, manifest
from framestream.pipeline.planning.dataset import open_dataset
from framestream.pipeline.tokenization.chat_template import build_chat_template

_spawn = get_context("spawn")


class TokenizingRun(NamedTuple):
    """One run that tokenized all dialogues, or what a killed one had left."""

    seconds: float  #: without the start of the first process
    cpu_seconds: float  #: of all processes
    name: str  #: of the file, which has the digest of its content


def cache_files(folder: Path, suffix: str) -> list[Path]:
    """Return the files of the token cache, or its parts."""
    return list((folder / "stage3" / "index").glob(f"tokens-*.{suffix}"))


def tokenize_root(folder: Path, cores: int, results=None) -> None:
    """Open the root in ``folder`` on the first ``cores`` of this machine; call it in a new process."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    build_chat_template(manifest(folder))  # imports what the tokenizer needs
    started = time.perf_counter()
    open_dataset(manifest(folder))
    seconds = time.perf_counter() - started
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    (file,) = cache_files(folder, "arrow")
    results.put(TokenizingRun(seconds, sum(one.ru_utime + one.ru_stime for one in usage), file.name))


def start(folder: Path, cores: int, results) -> BaseProcess:
    """Start a run in a new process."""
    process = _spawn.Process(target=tokenize_root, args=(folder, cores, results))
    process.start()
    return process


def measure_tokenizing(folder: Path, cores: int, remove: bool = True) -> TokenizingRun:
    """Run to the end on ``cores``, then remove the token cache if ``remove``."""
    results = _spawn.SimpleQueue()
    process = start(folder, cores, results)
    process.join()
    if process.exitcode:
        raise SystemExit(f"a run ended with status {process.exitcode}")
    if remove:
        for path in cache_files(folder, "arrow"):
            path.unlink()
    return results.get()


def measure_kill(folder: Path, cores: int, parts: int) -> tuple[int, TokenizingRun]:
    """Kill a run that has made ``parts`` parts; return how many it left, and the run that goes on with the rest."""
    results = _spawn.SimpleQueue()  # lives as long as the process needs it
    process = start(folder, cores, results)
    while len(cache_files(folder, "part")) < parts and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    return len(cache_files(folder, "part")), measure_tokenizing(folder, cores)


def main() -> None:
    """Generate a root, measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dialogues", type=int, default=200_000)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="for the generated files; a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        generate_index(folder, options.dialogues)
        for path in cache_files(folder, "arrow"):
            path.unlink()
        runs = {f"{cores} cores": measure_tokenizing(folder, cores) for cores in (1, options.cores)}
        kept, rest = measure_kill(folder, options.cores, parts=max(1, options.dialogues // 8192 // 2))
    finally:
        shutil.rmtree(folder)
    print(f"{options.dialogues:,} dialogues; load average {os.getloadavg()[0]:.1f}")
    print(f"{'run':<12}{'seconds':>9}{'CPU seconds':>13}{'dialogues/s':>13}{'dialogues/CPU s':>17}")
    for name, run in runs.items():
        rates = options.dialogues / run.seconds, options.dialogues / run.cpu_seconds
        print(f"{name:<12}{run.seconds:>9.1f}{run.cpu_seconds:>13.1f}{rates[0]:>13,.0f}{rates[1]:>17,.0f}")
    one, several = runs.values()
    print(f"rate of {options.cores} cores over that of one: {one.seconds / several.seconds:.2f}")
    print(f"killed with {kept} finished parts: {rest.seconds:.1f} s and {rest.cpu_seconds:.1f} CPU s for the rest")
    print(f"the same file: {len({run.name for run in (*runs.values(), rest)}) == 1}")


if __name__ == "__main__":
    main()
