"""Training is the same on any number of ranks and in plain PyTorch: the real command line on the demo's stage 2.

Each run must have the global batches, losses, gradient norms and final weights of the first. Here each of two runs
differs from it in several settings at once. ``python -m benchmarks.training.equivalence`` varies them one by one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.model import training_ways as ways

COUNT = 3  #: global batches of each run
STEPS = f"train.max_steps={COUNT}"
OTHERS: dict[str, ways.Way] = {
    "one_rank_zero1_dialogues_alone": (1, (ways.ALONE, "train.zero_stage=1")),
    "four_ranks_offloaded_recomputed": (
        4,
        ("train.offload=all", "train.gradient_checkpointing=all", "train.check_calls=true"),
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's data and the shards of stage 2, in which the commands run."""
    folder = tmp_path_factory.mktemp("demo")
    ways.prepare(folder, share=0.004)
    return folder


@pytest.fixture(scope="module")
def curve(folder: Path) -> str:
    """The output of the command that compares two ranks under ZeRO-3, whose run is ``first``, with plain PyTorch."""
    words = [word for setting in ways.SETTINGS for word in ("--set", setting)]
    options = ("--manifest", str(ways.MANIFEST), "--steps", str(COUNT), "--keep", "first")
    return corpus.run(sys.executable, "-m", "benchmarks.training.loss_curve", *options, *words, cwd=folder).stdout


@pytest.fixture(scope="module")
def first(folder: Path, curve: str) -> Path:
    return folder / "first"


def test_the_loss_curve_is_that_of_plain_pytorch(curve: str) -> None:
    """The exit status of the command says whether they are equal up to the first merging choice that differs."""
    assert f"2 ranks, ZeRO-3, {COUNT} steps" in curve and "no patch was merged into another token" in curve
    assert len([line for line in curve.splitlines() if line.startswith("| ")]) == 2 + COUNT
    assert (
        float(re.search(rf"largest relative difference: (\S+) in the {COUNT} steps", curve)[1])
        <= ways.TOLERANCES["loss"]
    )


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_give_the_same_training(folder: Path, first: Path, name: str) -> None:
    corpus.run(*ways.command(name, OTHERS[name], STEPS), cwd=folder)
    away = ways.apart(folder / name, first)
    print(name, {field: f"{value:.1e}" for field, value in away.items()})
    assert all(away[field] <= tolerance for field, tolerance in ways.TOLERANCES.items()), away


def test_a_killed_and_resumed_run_is_equal_bit_for_bit(folder: Path, first: Path) -> None:
    words = ways.command("resumed", (2, ()), STEPS, "train.save_every=1")
    log = folder / "resumed" / "log.jsonl"
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(words, env=corpus.environment(), cwd=folder, stdout=nowhere, stderr=nowhere)
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it was killed"
    corpus.kill(process)
    shutil.copytree(folder / "resumed", folder / "on_device")
    corpus.run(*words, cwd=folder)
    ours, theirs = corpus.log(log.parent), corpus.log(first)
    assert [(record["batch"], record["loss"]) for record in ours] == [(r["batch"], r["loss"]) for r in theirs]
    mine, other = ways.weights(log.parent), ways.weights(first)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], value) for key, value in other.items())

    # on the stand-in device, where there is a compiler
    words = ways.command("on_device", (2, ()), STEPS, "train.save_every=1")
    corpus.run(*corpus.on_device(words), cwd=folder)
    away = ways.apart(folder / "on_device", first)
    assert all(away[field] <= tolerance for field, tolerance in ways.TOLERANCES.items()), away
