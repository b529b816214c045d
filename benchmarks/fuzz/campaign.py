"""Run a campaign: write the corpus, damage each target's files many times, and judge every reading."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.fuzz.corpus import write_corpus
from benchmarks.fuzz.judge import RIGHT, WRONG, judge
from benchmarks.fuzz.mutators import mutate
from benchmarks.fuzz.sandbox import run_isolated
from benchmarks.fuzz.target import Reading, Target

PREPARE_SECONDS = 300.0  #: to write the corpus, or the files of a target
CHUNK = 20  #: mutants that a process takes at once


class FuzzError(RuntimeError):
    """A campaign cannot run, because a target does not work before it is damaged."""


@dataclass(frozen=True)
class Outcome:
    """What one mutant did."""

    target: str
    number: int
    file: str
    damage: str
    kind: str  #: a class of ``judge``
    detail: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Chunk:
    """Some mutants of one target."""

    target: Target
    sound: Reading
    numbers: tuple[int, ...]


class FuzzCampaign:
    """A campaign below ``folder`` with one seed."""

    def __init__(self, folder: Path, seed: int, targets: Sequence[Target]) -> None:
        self._folder, self._seed, self._targets = folder.resolve(), seed, targets
        self._corpus = self._folder / "corpus"

    def prepare(self) -> dict[str, Reading]:
        """Write the corpus and the files of every target; return what reading each gives without damage."""
        self._write(self._corpus, write_corpus, "the corpus")
        sound = {}
        for target in tqdm(self._targets, desc="targets", unit="target", disable=None):
            folder = self._folder / "sound" / target.name

            def prepare(target: Target = target) -> Reading:
                target.prepare(self._corpus)
                return Reading({})

            self._write(folder, prepare, target.name)
            if not target.list_files(folder):
                raise FuzzError(f"{target.name}: no file of {', '.join(target.files)} in {folder}")
            sound[target.name] = self._read_sound(target)
        return sound

    def _read_sound(self, target: Target) -> Reading:
        """Read a target without damage, and import here what that needs, so that mutants need not."""
        names = self._folder / "modules.txt"

        def read() -> Reading:
            reading = target.read("")
            names.write_text("\n".join(sys.modules), encoding="utf-8")
            return reading

        ended = run_isolated(read, self._copy(target, "first"), PREPARE_SECONDS)
        if ended.reading is None:
            raise FuzzError(f"{target.name}: does not work undamaged: {ended.error} {ended.trace} {ended.output}")
        for name in names.read_text(encoding="utf-8").split():
            if name not in sys.modules:
                with contextlib.suppress(Exception):  # modules that others made up
                    importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or the collector of each process copies all pages
        return ended.reading

    def _write(self, folder: Path, function, name: str) -> None:
        folder.mkdir(parents=True)
        ended = run_isolated(function, folder, PREPARE_SECONDS)
        if ended.reading is None:
            raise FuzzError(f"{name} cannot be written: {ended.error} {ended.trace} {ended.output}")

    def _copy(self, target: Target, process: str) -> Path:
        """Copy the sound files of a target to the folder of a process."""
        place = self._folder / "work" / process / target.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self._folder / "sound" / target.name, place, symlinks=True)
        return place

    def run(self, sound: dict[str, Reading], numbers: dict[str, Sequence[int]], processes: int) -> Iterator[Outcome]:
        """Yield the outcome of the mutants ``numbers`` of each target."""
        chunks = []
        for target in self._targets:
            chosen = numbers.get(target.name, ())
            chunks += [
                Chunk(target, sound[target.name], tuple(chosen[at : at + CHUNK])) for at in range(0, len(chosen), CHUNK)
            ]
        random.Random(self._seed).shuffle(chunks)  # so that the rate on the progress bar is steady
        if processes == 1:
            for chunk in chunks:
                yield from self.run_chunk(chunk)
            return
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        workers = [
            context.Process(target=self._work, args=(chunks[number::processes], queue)) for number in range(processes)
        ]
        for worker in workers:
            worker.start()
        running = processes
        while running:
            outcome = queue.get()
            running -= outcome is None
            if outcome is not None:
                yield outcome
        for worker in workers:
            worker.join()

    def _work(self, chunks: Sequence[Chunk], queue) -> None:
        try:
            for chunk in chunks:
                for outcome in self.run_chunk(chunk):
                    queue.put(outcome)
        finally:
            queue.put(None)

    def run_chunk(self, chunk: Chunk) -> Iterator[Outcome]:
        """Run some mutants one after the other."""
        for number in chunk.numbers:
            yield self.run_one(chunk.target, chunk.sound, number)

    def run_one(self, target: Target, sound: Reading, number: int) -> Outcome:
        """Damage a copy of the files of ``target``, read it and judge the result."""
        place = self._copy(target, str(os.getpid()))
        rng = random.Random(f"{self._seed}:{target.name}:{number}")
        file, damage = mutate(place, target.list_files(place), rng)
        is_gone = not (place / file).exists()
        if is_gone and target.may_lack:
            target = replace(target, is_truth=True)
        started = time.monotonic()
        ended = run_isolated(lambda: target.read(file), place)
        kind, detail = judge(target, file, sound, ended)
        return Outcome(target.name, number, file, damage, kind, detail, time.monotonic() - started)


def share_out(targets: Sequence[Target], mutants: int) -> dict[str, Sequence[int]]:
    """Distribute ``mutants`` over targets by their shares: the numbers of the mutants of each."""
    total = sum(target.share for target in targets)
    bounds, passed = [0], 0.0
    for target in targets:
        passed += target.share
        bounds.append(round(mutants * passed / total))
    return {target.name: range(end - start) for target, start, end in zip(targets, bounds, bounds[1:], strict=False)}


def read_outcomes(path: Path) -> list[Outcome]:
    """Read the outcomes that :func:`append_outcome` wrote; none if there is no such file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def append_outcome(path: Path, outcome: Outcome) -> None:
    """Append an outcome to a file as a line of JSON."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def summary_table(outcomes: Sequence[Outcome]) -> str:
    """Format the number of mutants of each target and class as a Markdown table."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        counts[outcome.target][outcome.kind] += 1
    columns = (*RIGHT, *WRONG)
    rows = [["target", "mutants", *columns, "ms"], ["---"] * (3 + len(columns))]
    for name in [*counts, "all"]:
        found = counts[name] if name in counts else sum(counts.values(), Counter())
        seconds = [outcome.seconds for outcome in outcomes if name in (outcome.target, "all")]
        milliseconds = 1000 * sum(seconds) / max(1, len(seconds))
        rows.append([name, f"{found.total():,}", *(f"{found[kind]:,}" for kind in columns), f"{milliseconds:,.0f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def fault_lines(outcomes: Sequence[Outcome]) -> list[str]:
    """Describe each mutant whose outcome is not right, with what repeats it."""
    return [
        f"--only {o.target}:{o.number}  {o.kind}: {o.file}: {o.damage}: {o.detail}" for o in outcomes if o.kind in WRONG
    ]
