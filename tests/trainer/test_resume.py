"""Going on through the real command line: on another number of ranks, after SIGTERM and SIGUSR1."""

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
from trainer import disk
from trainer.leave import STATUS

#: different rates and decays, large enough that one in place of another would show at once, and a part that is frozen
PARTS = (
    "train.vision_tower={train: true, lr: 1e-3, weight_decay: 0.1}",
    "train.connector={train: true, lr: 4e-3, weight_decay: 20}",
    "train.language_model={train: false}",
    "train.max_steps=9",
    "train.save_every=100",
)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in sorted((run / "final").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def part_of(name: str) -> str:
    return next((part for part in ("vision_tower", "mm_projector") if part in name), "language_model")


def leaves(command: list[str], run: Path, step: int, number: int) -> tuple[int, str]:
    """Exit status and output of ``command``, which gets signal ``number`` once ``step`` steps are logged."""
    process = subprocess.Popen(
        command,
        env=corpus.environment(),
        cwd=corpus.PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log = run / "log.jsonl"
    while process.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= step):
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


@pytest.mark.parametrize("zero_stage", [3, 1])
def test_two_ranks_then_one_then_two_equal_two_all_along(manifest: Path, tmp_path: Path, zero_stage: int) -> None:
    """Each time the run is asked to leave, and saves at a step where no checkpoint was due."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    stage = f"train.zero_stage={zero_stage}"
    corpus.run(*corpus.train_command(manifest, 2, f"output={straight}", stage, *PARTS))
    two = corpus.train_command(manifest, 2, f"output={run}", stage, *PARTS)

    _, said = leaves(two, run, 2, signal.SIGTERM)  # torchrun's own status is 1, whatever that of its ranks
    assert "stopped by SIGTERM" in said
    assert len(list((run / "checkpoints").glob("step-*"))) == 1
    files = [path for path in (run / "checkpoints").glob("step-*/*optim_states.pt")]
    assert len(files) == 2

    one = [sys.executable, *two[two.index("-m") :]]
    status, said = leaves(one, run, 5, signal.SIGUSR1)
    assert status == STATUS == 75
    assert "is of 2 ranks, this run has 1; converting it" in said and "stopped by SIGUSR1" in said

    done = corpus.run(*two)
    assert "is of 1 ranks, this run has 2; converting it" in done.stdout
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(("part", "univ"))] == []

    ours, theirs = corpus.log(run), corpus.log(straight)
    assert [(r["step"], r["batch"], r["lr"]) for r in ours] == [(r["step"], r["batch"], r["lr"]) for r in theirs]
    assert {r["ranks"] for r in ours} == {1, 2}
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    found, wanted = weights(run), weights(straight)
    for part in ("vision_tower", "mm_projector", "language_model"):
        names = [name for name in wanted if part_of(name) == part]
        difference = sum((found[n] - wanted[n]).pow(2).sum() for n in names).sqrt()
        norm = sum(wanted[n].pow(2).sum() for n in names).sqrt()
        assert names and difference <= (0 if part == "language_model" else 1e-3) * norm, part


def test_what_a_checkpoint_takes_is_known_beforehand(manifest: Path, tmp_path: Path) -> None:
    """The files hold what is trained alone; pickled names and settings come on top."""
    from pipeline.manifest import load_manifest

    for zero_stage in (1, 3):
        sets = [f"output={tmp_path / str(zero_stage)}", f"train.zero_stage={zero_stage}", *PARTS, "train.max_steps=1"]
        done = corpus.run(*corpus.train_command(manifest, 1, *sets))
        made = load_manifest(manifest, sets)
        (folder,) = (tmp_path / str(zero_stage) / "checkpoints").glob("step-*")
        size = sum(path.stat().st_size for path in folder.glob("*.pt"))
        stated = disk.checkpoint_bytes(made)
        assert stated < size < stated + 120_000
        assert disk.describe_disk(made) in done.stdout


def test_a_run_that_the_disk_cannot_hold_is_refused_before_it_begins(manifest: Path, tmp_path: Path) -> None:
    keep = 10**9
    command = corpus.train_command(manifest, 2, f"output={tmp_path / 'run'}", f"train.keep_last={keep}")
    done = corpus.run(*command, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert "GB are needed" in line and "lower train.keep_last" in line
    assert os.listdir(tmp_path / "run") == []
