"""Validation through the real command line: two ranks under ZeRO-3, killed, resumed and stopped early by its scores.

A run without validation is beside it, and goes on to the last step.
"""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.evaluation.held_out import HeldOutDialogues
from framestream.pipeline.loading.loader import build_loader
from framestream.trainer.checkpoint.export import export
from framestream.trainer.checkpoint.state import best_checkpoint, latest_checkpoint, read_state
from framestream.trainer.weights.load import load_pretrained
from tests.helpers.corpora import training_corpus as corpus

EVALUATE = "evaluate={every: 2, questions: 5, max_new_tokens: 4, best: accuracy, patience: 1}"
SETS = ("train.check_calls=true", "train.epochs=2")
STOP = 4  #: the step after which the validated run stops: it answers nothing correctly


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def kill_after(command: list[str], log: Path, steps: int) -> None:
    """Start ``command``, and kill all its processes once ``steps`` steps are logged."""
    process = subprocess.Popen(command, env=corpus.environment(), cwd=corpus.PROJECT, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= steps):
            time.sleep(0.02)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        corpus.kill(process)
        assert process.returncode == -signal.SIGKILL


def test_a_validated_run_is_the_same_run_killed_or_not(tmp_path: Path) -> None:
    manifest = corpus.make(tmp_path / "corpus", videos=4)
    plain, run = tmp_path / "plain", tmp_path / "run"
    corpus.run(*corpus.train_command(manifest, 2, f"output={plain}", f"train.save_every={STOP}", *SETS))
    command = corpus.train_command(manifest, 2, f"output={run}", EVALUATE, "train.keep_last=1", *SETS)
    kill_after(command, run / "log.jsonl", STOP - 1)
    done = corpus.run(*command)
    assert "resumed from the checkpoint of step" in done.stderr and "rank 0 INFO" in done.stderr

    ours, theirs = corpus.log(run), corpus.log(plain)
    reason = f"stopped early after step {STOP} of {len(theirs)}, because 1 validation had no better accuracy"
    assert f"{reason} (evaluate.patience: 1); the best, accuracy" in done.stderr
    assert len(ours) == STOP < len(theirs)
    del theirs[STOP:]
    assert [(line["step"], line["batch"], line["loss"], line["grad_norm"]) for line in ours] == [
        (line["step"], line["batch"], line["loss"], line["grad_norm"]) for line in theirs
    ]
    export(plain / "checkpoints" / f"step-{STOP:06d}", tmp_path / "exported")
    final, expected = weights(run / "final"), weights(tmp_path / "exported")
    assert final.keys() == expected.keys() and all(torch.equal(final[name], expected[name]) for name in expected)

    validated = {line["step"]: line for line in ours if "val_loss" in line}
    assert list(validated) == [2, STOP]
    best = max(validated, key=lambda step: validated[step]["val_accuracy"])
    assert ours[-1]["val_best_step"] == best == 2 and ours[-1]["val_best"] == validated[best]["val_accuracy"]
    assert all(line["val_dialogues"] == 5 and 0 <= line["val_accuracy"] <= 100 for line in validated.values())
    assert best_checkpoint(run) == f"step-{best:06d}" and read_state(run / "checkpoints" / best_checkpoint(run))
    kept = {best_checkpoint(run), latest_checkpoint(run).name}
    assert {path.name for path in (run / "checkpoints").glob("step-*")} == kept

    made = load_manifest(manifest, (EVALUATE,))
    dialogues, model = HeldOutDialogues(made, build_loader(made).dataset, 5), load_pretrained(run / "final")
    rows = [dialogues.read(i).row for i in range(len(dialogues))]
    with torch.no_grad():
        loss = sum(float(model(row)) for row in rows) / sum(len(row.label_positions) for row in rows)
    assert ours[-1]["val_loss"] == pytest.approx(loss, rel=1e-5)
