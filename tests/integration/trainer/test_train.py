"""Training through the real command line: ranks, ZeRO stages, chaining, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from framestream.trainer.__main__ import main
from framestream.trainer.monitoring import trackers
from tests.helpers.corpora import training_corpus as corpus


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def straight(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run on two ranks under ZeRO-3."""
    run = tmp_path_factory.mktemp("straight")
    corpus.run(*corpus.train_command(manifest, 2, f"output={run}"))
    return run


def tensors(run: Path) -> dict:
    found = {}
    for path in sorted((run / "final").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_losses_fall_and_every_dialogue_is_used(straight: Path) -> None:
    records = corpus.log(straight)
    assert [record["step"] for record in records] == list(range(1, records[-1]["steps"] + 1))
    assert sum(record["dialogues"] for record in records) == 3 * 22
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert {"vision_tower", "connector", "language_model"} == set(records[0]["lr"])


def test_a_finished_stage_is_kept_and_the_next_starts_from_it(manifest: Path, straight: Path, tmp_path: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (straight / "final").iterdir()}
    done = corpus.run_here(*corpus.train_command(manifest, 1, f"output={straight}"))
    assert "already trained" in done.stderr and f"final weights are in {straight / 'final'}" in done.stdout
    assert before == {path.name: path.stat().st_mtime_ns for path in (straight / "final").iterdir()}
    run = tmp_path / "next"
    init = f"init_from={{run: {straight}, vision_tower: '', connector: '', language_model: ''}}"
    frozen = "train.language_model={train: false, lr: 0}"
    corpus.run(*corpus.train_command(manifest, 2, f"output={run}", init, frozen, "train.max_steps=2"))
    ours, theirs = tensors(run), tensors(straight)
    language = [name for name in ours if name.startswith(("model.layers", "model.embed_tokens", "lm_head"))]
    assert language and all((ours[name] == theirs[name]).all() for name in language)
    assert any((ours[name] != theirs[name]).any() for name in ours if "mm_projector" in name)
    assert corpus.log(run)[0]["loss"] < 0.8 * corpus.log(straight)[0]["loss"]


def test_a_finished_stage_with_other_settings_is_refused(manifest: Path, straight: Path) -> None:
    before = (straight / "manifest.yaml").read_text()
    command = corpus.train_command(manifest, 1, f"output={straight}", "train.connector.lr=0.5")
    done = corpus.run_here(*command, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "train.connector.lr (saved: 0.003, now: 0.5)" in line and f"remove {straight}" in line
    assert (straight / "manifest.yaml").read_text() == before


def test_evaluation_asks_every_question_twice(manifest: Path, straight: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    corpus.run_here(
        *("-m", "trainer.evaluate", "--manifest", str(manifest)),
        *("--checkpoint", str(straight / "final"), "--out", str(out)),
    )
    result = json.loads(out.read_text())
    (family,) = result["families"]
    assert family["family"] == "colour" and family["questions"] == 16
    assert family["low"] <= family["accuracy"] <= family["high"]
    assert family["gain"] == pytest.approx(family["accuracy"] - family["blind"])
    assert result["examples"][0]["frames_jpeg"] and result["examples"][0]["expected"]


@pytest.mark.parametrize(
    ("ranks", "assignment", "message"),
    [
        (1, "train.epochs=many", "train.epochs: expected a whole number"),
        (1, "train.epoch=2", "did you mean `epochs`?"),
        (1, "shards=nowhere", "no finished shards here"),
        (1, "frames.max=64", "frames.max: is 64, the shards have 8"),
        (1, "data.entries=[{annotation: other.json}]", "data.entries: other is not as the shards were built"),
        (1, "model.language_model.vocab_size=768", "vocab_size: 768 is fewer than the 1003 ids"),
        (2, "batching.row_multiple=3", "row_multiple: 3 is not a multiple of the 2 ranks"),
    ],
)
def test_bad_input_is_one_clear_line(manifest: Path, tmp_path: Path, ranks: int, assignment: str, message: str) -> None:
    run = tmp_path / "run"
    command = corpus.train_command(manifest, ranks, f"output={run}", assignment)
    run_one = corpus.run_here if ranks == 1 else corpus.run  # a launcher's status is 1, whatever that of its ranks
    done = run_one(*command, check=False)
    assert done.returncode == (2 if ranks == 1 else 1)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert not (run / "log.jsonl").exists()


def test_dry_run_needs_neither_shards_nor_weights(manifest: Path) -> None:
    done = corpus.run_here(
        *("-m", "trainer", "--manifest", str(manifest), "--dry-run"),
        *("--set", "shards=nowhere", "--set", "text.tokenizer=nowhere", "--set", "init_from.vision_tower=nowhere"),
    )
    assert "steps: unknown" in done.stdout and "tools/build_shards.py" in done.stdout
    assert "frozen" not in done.stdout and "language_model" in done.stdout


def test_a_dry_run_misses_what_the_run_would_miss(manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: package != "trackio")
    assert main(["--manifest", str(manifest), "--dry-run", "--set", "train.trackers=[wandb, trackio]"]) == 2
    assert "train.trackers: trackio: not installed; pip install trackio" in capsys.readouterr().err


def test_only_the_first_of_several_ranks_prints_a_dry_run(manifest: Path, monkeypatch, capsys) -> None:
    for rank, printed in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert main(["--manifest", str(manifest), "--dry-run"]) == 0
        assert ("steps: " in capsys.readouterr().out) == printed
