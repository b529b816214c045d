"""Adapters through the real command line: two ranks under ZeRO-3, SIGKILL and resume, 4-bit weights, export."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from framestream.pipeline.config.manifest import load_manifest
from framestream.trainer import export
from framestream.trainer.weights.load import load_pretrained, save_weights
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.model.weights import initialised

PARTS = ("vision_tower", "connector", "language_model")
ADAPTERS = "adapters/language_model/adapter_model.safetensors"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def base(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The final weights of a run, which adapters are trained on."""
    folder, settings = tmp_path_factory.mktemp("base"), load_manifest(manifest)
    save_weights(initialised(settings), folder / "final", settings)
    return folder / "final"


def tune(manifest: Path, base: Path, ranks: int, run: Path, load: str = "full", *more: str) -> list[str]:
    """Return the command that tunes the language model by adapters, with dropout, beside a trained connector."""
    lora = f"{{r: 4, alpha: 8, dropout: 0.2, load: {load}}}"
    settings = (
        f"output={run}",
        "train.vision_tower={train: false}",
        f"train.language_model={{train: true, lr: 1e-2, lora: {lora}}}",
        *(f"init_from.{part}={base}" for part in PARTS),
        "train.max_steps=8",
        "train.save_every=4",
    )
    command = corpus.train_command(manifest, ranks, *settings, *more)
    return command if ranks > 1 else [sys.executable, *command[command.index("-m") :]]


@pytest.fixture(scope="module")
def straight(manifest: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two ranks under ZeRO-3."""
    run = tmp_path_factory.mktemp("straight")
    corpus.run(*tune(manifest, base, 2, run))
    return run


def values(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of final weights, adapters included."""
    return load_file(run / "final" / "model.safetensors") | load_file(run / "final" / ADAPTERS)


def test_losses_fall_and_final_weights_have_what_was_trained(straight: Path) -> None:
    records = corpus.log(straight)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"] and records[0]["zero_stage"] == 3
    assert all(name.startswith(("base_model.", "model.mm_projector.")) for name in values(straight))


def test_a_killed_run_ends_with_the_same_bits(manifest: Path, base: Path, straight: Path, tmp_path: Path) -> None:
    """On two ranks, killed after the first checkpoint; dropout included."""
    command = tune(manifest, base, 2, tmp_path)
    process = subprocess.Popen(command, env=corpus.environment(), cwd=corpus.PROJECT)
    while not (tmp_path / "checkpoints" / "latest").exists():
        assert process.poll() is None
        time.sleep(0.02)
    corpus.kill(process)
    assert not (tmp_path / "final").exists()
    corpus.run(*command)
    expected, found = values(straight), values(tmp_path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_one_process_learns_the_same_under_zero_1(manifest: Path, base: Path, straight: Path, tmp_path: Path) -> None:
    """Masks of dropout depend on the row, not on the rank. Taken back to step 4, the run ends with the same bits."""
    command = tune(manifest, base, 1, tmp_path, "full", "train.zero_stage=1")
    corpus.run_here(*command)
    wanted = values(tmp_path)
    take_back(tmp_path)
    corpus.run_here(*command)
    found = values(tmp_path)
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for ours, theirs in zip(corpus.log(straight), corpus.log(tmp_path), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_one_rank_goes_on_from_two(manifest: Path, base: Path, straight: Path, tmp_path: Path) -> None:
    run = shutil.copytree(straight, tmp_path / "run")
    take_back(run)
    corpus.run_here(*tune(manifest, base, 1, run))
    ours, theirs = corpus.log(run), corpus.log(straight)
    assert [record["ranks"] for record in ours] == [2] * 4 + [1] * 4
    assert [record["loss"] for record in ours] == pytest.approx([record["loss"] for record in theirs], rel=1e-4)
    found, wanted = values(run), values(straight)
    assert found.keys() == wanted.keys()
    difference, norm = (
        sum(tensor.pow(2).sum() for tensor in tensors).sqrt()
        for tensors in ([found[name] - wanted[name] for name in wanted], wanted.values())
    )
    assert difference < 1e-2 * norm


def take_back(run: Path) -> None:
    """Leave a finished run as it was after the checkpoint of step 4."""
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-000008")
    (run / "checkpoints" / "latest").write_text("step-000004")


def test_weights_in_4_bits_are_tuned_on_two_ranks(manifest: Path, base: Path, straight: Path, tmp_path: Path) -> None:
    """Taken back to step 4, the run ends with the same bits."""
    command = tune(manifest, base, 2, tmp_path, "4bit", "train.zero_stage=2")
    corpus.run(*command)
    wanted, logged = values(tmp_path), corpus.log(tmp_path)
    take_back(tmp_path)
    corpus.run(*command)
    found = values(tmp_path)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [record["loss"] for record in corpus.log(tmp_path)] == [record["loss"] for record in logged]
    losses, others = ([record["loss"] for record in corpus.log(run)] for run in (tmp_path, straight))
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] != others[0] and losses[0] == pytest.approx(others[0], rel=0.1)
    assert values(tmp_path).keys() == values(straight).keys()
    load_pretrained(tmp_path / "final")
    refused = tune(manifest, base, 1, tmp_path / "three", "8bit")
    done = corpus.run_here(*refused, check=False)
    assert done.returncode == 2 and "lora.load: 8bit does not work with zero_stage 3" in done.stderr


def test_exports_merge_as_peft_does_and_the_rest_stays(base: Path, straight: Path, tmp_path: Path, capsys) -> None:
    out = ["--checkpoint", str(straight), "--out", str(tmp_path / "out")]
    assert export.main(out) == 2 and not (tmp_path / "out").exists()
    there = straight / "final" / "adapters"
    assert capsys.readouterr().err == f"error: {straight}: it has adapters (in peft's layout in {there}); add --merge\n"
    assert export.main([*out, "--merge"]) == 0
    assert export.main(["--checkpoint", str(base), "--out", str(tmp_path / "plain"), "--merge"]) == 2
    assert "it has no adapters; drop --merge" in capsys.readouterr().err
    merged, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    plain = load_pretrained(base).language_model
    theirs = peft.PeftModel.from_pretrained(plain, straight / "final" / Path(ADAPTERS).parent).merge_and_unload()
    assert merged.keys() == before.keys()
    changed = {name for name, tensor in merged.items() if not torch.equal(tensor, before[name])}
    for name, tensor in theirs.named_parameters():
        assert torch.equal(tensor, merged[name]), name
    assert {name for name in changed if "mm_projector" not in name} == {
        f"model.layers.{layer}.{module}.weight"
        for layer in range(2)
        for module in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| language model | LoRA adapters of rank 4, alpha 8, merged; learning rate 0.01 |" in card
    checkpoint = next((straight / "checkpoints").glob("step-*8"))
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {checkpoint}: it has adapters; add --merge\n"
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "unfinished"), "--merge"]) == 0
    other = load_file(tmp_path / "unfinished" / "model.safetensors")
    assert merged.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in merged.items())
