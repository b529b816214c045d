"""Resuming through the real command line: on another number of ranks, after SIGTERM and SIGUSR1.

The first part of a run computes on the CPU, the others on the stand-in device where there is a compiler.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from framestream.pipeline.config.manifest import load_manifest
from framestream.trainer.checkpoint.disk_usage import checkpoint_bytes, describe_disk
from framestream.trainer.checkpoint.state import latest_checkpoint
from framestream.trainer.distributed.launchers import EXIT_PREEMPTED
from tests.helpers.corpora import training_corpus as corpus

#: different rates and decays, large enough that a mix-up would show at once, and a frozen part
PARTS = (
    "train.vision_tower={train: true, lr: 1e-3, weight_decay: 0.1}",
    "train.connector={train: true, lr: 4e-3, weight_decay: 10}",
    "train.language_model={train: false}",
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


def interrupt(command: list[str], run: Path, step: int, number: int) -> tuple[int, str]:
    """Return exit status and output of ``command``, which gets signal ``number`` once ``step`` steps are logged."""
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
    try:
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, said


@pytest.fixture(scope="module")
def straight(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two ranks under ZeRO-3."""
    run = tmp_path_factory.mktemp("straight")
    corpus.run(*corpus.train_command(manifest, 2, f"output={run}", *PARTS))
    return run


@pytest.mark.parametrize(
    ("zero_stage", "asked", "options"),
    [(3, signal.SIGTERM, ()), (1, signal.SIGUSR1, ("--signals_to_handle", "SIGTERM,SIGINT,SIGUSR1"))],
    ids=["zero3", "zero1"],
)
def test_resuming_on_other_ranks_equals_an_uninterrupted_run(
    manifest: Path, straight: Path, tmp_path: Path, zero_stage: int, asked: signal.Signals, options: tuple[str, ...]
) -> None:
    """Each time the run gets a signal, and saves at a step where no checkpoint was due."""
    run = tmp_path / "run"
    sets = (f"output={run}", f"train.zero_stage={zero_stage}", *PARTS)
    launcher, *rest = corpus.train_command(manifest, 2, *sets)
    two = [launcher, *options, *rest]

    _, said = interrupt(two, run, 2, asked)  # torchrun's own status is 1, whatever that of its ranks
    assert f"stopped by {asked.name}" in said
    (saved,) = (run / "checkpoints").glob("step-*")  # of step 2, or of the one that was running
    files = list((run / "checkpoints").glob("step-*/*optim_states.pt"))
    assert len(files) == 2

    two = corpus.on_device([*two, "--set", f"loader.workers={int(zero_stage == 1)}"])
    one = [sys.executable, *two[two.index("-m") :]]
    status, said = interrupt(one, run, 5, signal.SIGUSR1)
    assert status == EXIT_PREEMPTED == 75
    assert "from 2 to 1 ranks" in said and "stopped by SIGUSR1" in said
    assert "INFO" in said and f"resumed from the checkpoint of step {int(saved.name.removeprefix('step-'))}" in said

    done, made = corpus.run(*two), load_manifest(manifest, sets)
    assert "rank 0 INFO" in done.stderr and "from 1 to 2 ranks" in done.stderr
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(("part", "univ"))] == []
    stated = checkpoint_bytes(made)  # of what is trained; pickled names and settings come on top
    assert stated < sum(path.stat().st_size for path in latest_checkpoint(run).glob("*.pt")) < stated + 150_000
    assert done.stderr.count(describe_disk(made)) == 1

    ours, theirs = corpus.log(run), corpus.log(straight)
    assert [(r["step"], r["batch"], r["lr"]) for r in ours] == [(r["step"], r["batch"], r["lr"]) for r in theirs]
    assert {r["ranks"] for r in ours} == {1, 2}
    assert [r["loss"] for r in ours] == pytest.approx([r["loss"] for r in theirs], rel=1e-4)
    found, wanted = weights(run), weights(straight)
    for part in ("vision_tower", "mm_projector", "language_model"):
        names = [name for name in wanted if part_of(name) == part]
        difference = sum((found[n] - wanted[n]).pow(2).sum() for n in names).sqrt()
        norm = sum(wanted[n].pow(2).sum() for n in names).sqrt()
        assert names and difference <= (0 if part == "language_model" else 1e-2) * norm, part


def test_a_run_that_needs_more_disk_is_refused_at_the_start(manifest: Path, tmp_path: Path) -> None:
    keep = 10**9
    command = corpus.train_command(manifest, 2, f"output={tmp_path / 'run'}", f"train.keep_last={keep}")
    done = corpus.run(*command, check=False)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1
    assert "GB are needed" in line and "lower train.keep_last" in line
    assert not (tmp_path / "run").exists()
