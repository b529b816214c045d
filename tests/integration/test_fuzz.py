"""The short form of ``make fuzz``, and its classes of outcomes."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

from benchmarks.fuzz.campaign import Outcome, share_out, summary_table
from benchmarks.fuzz.judge import judge
from benchmarks.fuzz.mutators import mutate
from benchmarks.fuzz.sandbox import run_isolated
from benchmarks.fuzz.target import CommandError, Reading, Target
from tests.helpers.corpora import training_corpus as corpus

SOUND = Reading({"a": "1", "b": "2"})
FILE = "fuzz-root/index/media.arrow"


def crash() -> None:
    os.abort()


def fail(error: Exception) -> None:
    raise error


def read_more(**items: str) -> Reading:
    return Reading({**SOUND.items, **items})


@pytest.mark.parametrize(
    ("kind", "read", "is_truth"),
    [
        ("clean", lambda: fail(CommandError("error: media.arrow: is damaged; build it again")), False),
        ("clean", lambda: fail(CommandError("error: fuzz-root: has no index")), False),
        ("nameless", lambda: fail(CommandError("error: Expecting value")), False),
        ("traceback", lambda: fail(KeyError("media.arrow")), False),
        ("memory", lambda: fail(MemoryError()), False),
        ("crash", crash, False),
        ("hang", lambda: time.sleep(60), False),
        ("same", lambda: SOUND, False),
        ("row", lambda: Reading({"a": "1"}, {"b": "corrupt"}), False),
        ("wrong", lambda: Reading({"a": "1"}), False),
        ("wrong", lambda: read_more(b="3"), False),
        ("accepted", lambda: read_more(b="3"), True),
    ],
)
def test_an_outcome_has_the_class_that_its_words_say(kind, read, is_truth, tmp_path):
    target = Target("target", lambda corpus: None, (FILE,), lambda file: SOUND, is_truth)
    ended = run_isolated(read, tmp_path, seconds=1 if kind == "hang" else 20)
    assert judge(target, FILE, SOUND, ended)[0] == kind


def test_damage_is_decided_by_the_seed(tmp_path):
    for number in range(60):
        found = []
        for copy in ("first", "second"):
            folder = tmp_path / f"{copy}{number}"
            folder.mkdir()
            (folder / "a.json").write_text(json.dumps({"numbers": [1, 2.5], "texts": ["x", "y"]}))
            (folder / "b.bin").write_bytes(bytes(range(256)) * 4)
            before = {path.name: path.read_bytes() for path in folder.iterdir()}
            name, _ = mutate(folder, ["a.json", "b.bin"], random.Random(f"0:{number}"))
            after = {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}
            assert after != before and {k: after.get(k) for k in before if k != name} == {
                k: v for k, v in before.items() if k != name
            }
            found.append(after)
        assert found[0] == found[1]


def test_mutants_are_shared_out_and_counted():
    targets = [Target(name, fail, (), fail, share=share) for name, share in (("a", 1), ("b", 2), ("c", 0.5))]
    numbers = share_out(targets, 70)
    assert {name: len(found) for name, found in numbers.items()} == {"a": 20, "b": 40, "c": 10}
    outcomes = [Outcome("a", 0, "f", "d", "clean", ""), Outcome("a", 1, "f", "d", "hang", "")]
    assert "| a | 2 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0 |" in summary_table(outcomes)


def test_short_campaign_over_all_targets_finds_nothing(tmp_path: Path):
    command = (sys.executable, "-m", "benchmarks.fuzz", "--seed", "0", "--mutants", "45")
    done = corpus.run(*command, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "45 mutants" in done.stdout and done.stdout.count("\n| ") > 30
