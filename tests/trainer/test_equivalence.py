"""The same training however it is run, through the real command line on the demo's stage 2.

Videos of 4 to 8 frames, tiled stills, pairs of pictures and text; all three parts learn, in float32. The ways differ
in packing, micro-steps, ranks, ZeRO stage, offload and recomputation. Each run must have the global batches of the
first, its losses and gradient norms, and its final weights.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.trainer import corpus
from tools import demo_data

MANIFEST = corpus.PROJECT / "manifests" / "demo" / "stage2.yaml"
STEPS = 4
SETTINGS = (
    "init_from={run: '', vision_tower: random, connector: random, language_model: random}",
    f"train.max_steps={STEPS}",
    "train.warmup=0",
    "batching.row_multiple=4",
)
LOSS, NORM, UPDATE = 1e-5, 1e-4, 1e-3  #: relative tolerances: losses, gradient norms, what training added to a weight

WAYS = {  #: name -> ranks and assignments; the first is what the others are compared with
    "two_ranks": (2, ()),
    "one_rank": (1, ()),
    "four_ranks": (4, ()),
    "dialogues_alone": (2, ("batching.row_multiple=16",)),
    "one_batch": (1, ("batching.row_multiple=1",)),
    "accumulated": (1, ("batching.row_multiple=16",)),
    "zero1": (2, ("train.zero_stage=1",)),
    "zero2": (2, ("train.zero_stage=2",)),
    "offload": (2, ("train.offload=all",)),
    "recomputed": (2, ("train.gradient_checkpointing=true", "train.check_calls=true")),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the demo's commands run: its data, and the shards of stage 2."""
    folder = tmp_path_factory.mktemp("demo")
    demo_data.generate(folder / "demo" / "data", workers=1, share=0.03)
    build = (sys.executable, str(corpus.PROJECT / "tools" / "build_shards.py"), "--stage", "2", "--workers", "1")
    corpus.run(*build, "--manifest", str(MANIFEST), cwd=folder)
    return folder


def command(name: str, *more: str) -> list[str]:
    """The command of one way, its output in ``name``."""
    ranks, assignments = WAYS[name.split("-")[0]]
    words = corpus.train_command(MANIFEST, ranks, f"output={name}", *SETTINGS, *assignments, *more)
    return words if ranks > 1 else [sys.executable, *words[words.index("-m") :]]


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((run / "final").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    corpus.run(*command("two_ranks"), cwd=folder)
    return folder / "two_ranks"


@pytest.mark.parametrize("name", list(WAYS)[1:])
def test_however_it_is_run_it_is_the_same_training(folder: Path, first: Path, name: str) -> None:
    corpus.run(*command(name), cwd=folder)
    ours, theirs = corpus.log(folder / name), corpus.log(first)
    assert [record["batch"] for record in ours] == [record["batch"] for record in theirs]
    assert len(ours) == STEPS
    away = {
        field: max(abs(a[field] - b[field]) / b[field] for a, b in zip(ours, theirs, strict=True))
        for field in ("loss", "grad_norm")
    }
    mine, other = weights(folder / name), weights(first)
    assert mine.keys() == other.keys()
    distance = sum((mine[key] - value).square().sum() for key, value in other.items()).sqrt()
    length = sum(value.square().sum() for value in other.values()).sqrt()
    print(f"{name}: loss {away['loss']:.1e}, gradient norm {away['grad_norm']:.1e}, weights {distance / length:.1e}")
    assert away["loss"] <= LOSS and away["grad_norm"] <= NORM and distance / length <= UPDATE


def test_killed_and_resumed_is_the_same_to_the_last_bit(folder: Path, first: Path) -> None:
    words = command("two_ranks-resumed", "train.save_every=1")
    log = folder / "two_ranks-resumed" / "log.jsonl"
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen(
            words, env=corpus.environment(), cwd=folder, start_new_session=True, stdout=nowhere, stderr=nowhere
        )
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    corpus.run(*words, cwd=folder)
    ours, theirs = corpus.log(log.parent), corpus.log(first)
    assert [(record["batch"], record["loss"]) for record in ours] == [(r["batch"], r["loss"]) for r in theirs]
    mine, other = weights(log.parent), weights(first)
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], value) for key, value in other.items())


def test_the_loss_curve_is_that_of_plain_pytorch(folder: Path) -> None:
    compared = (sys.executable, "-m", "benchmarks.loss_curve", "--manifest", str(MANIFEST), "--steps", "5")
    done = corpus.run(*compared, "--set", "batching.row_multiple=4", cwd=folder)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 5 and "largest relative difference" in done.stdout
    assert "2 ranks, ZeRO-3, 5 steps" in done.stdout
