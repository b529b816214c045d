"""Global batches whose loss or gradient is not finite: their update is skipped, and a run ends at a limit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from framestream.trainer.monitoring.run_ledger import read_run_ledger
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.emulator import unavailable


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    worker = "tests.helpers.workers.not_finite_worker"
    corpus.run(*corpus.on_device(["torchrun", "--standalone", "--nproc_per_node", "2", "-m", worker, str(folder)]))
    return folder


@pytest.mark.parametrize("name", ["1-none", "3-none", "3-optimizer"])
def test_a_skipped_step_leaves_the_weights_unchanged(results: Path, name: str):
    result = json.loads((results / f"result-{name}.json").read_text())
    for fault in ("loss", "gradient"):
        assert result[fault]["equal"]
        assert [record["applied"] for record in result[fault]["records"]] == [True, False, True, True]
    assert [note[:3] for note in result["loss"]["noted"]] == [["d111", 0, 1]]  # the one row, on the second rank
    assert "loss of its row is" in result["loss"]["noted"][0][3]
    assert sorted(note[0] for note in result["gradient"]["noted"]) == ["d100", "d101", "d110", "d111"]


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
@pytest.mark.parametrize("name", ["1-none", "3-none"])
def test_the_host_waits_three_times_a_micro_step_at_most(results: Path, name: str):
    """Whatever the number of groups of clips. The last global batch has one micro-step more than the one before."""
    *_, two, three = json.loads((results / f"result-{name}.json").read_text())["waits"]
    assert two and sum(three.values()) - sum(two.values()) <= 3, (two, three)


def test_a_run_that_diverges_ends_at_the_limit(tmp_path: Path):
    manifest, run = corpus.make(tmp_path, videos=2), tmp_path / "run"
    wild = [
        f"train.{part}={{train: true, lr: 1, weight_decay: 10}}"
        for part in ("vision_tower", "connector", "language_model")
    ]
    counts = []
    for limit in (2, 4):  # the second command resumes from the checkpoint, and so does the count
        settings = (*wild, "train.save_every=1", "train.epochs=40", f"train.max_not_finite={limit}")
        done = corpus.run_here(*corpus.train_command(manifest, 1, f"output={run}", *settings), check=False)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode and f"train.max_not_finite ({limit})" in line and str(run / "ledger") in line
        records = [json.loads(text, parse_constant=pytest.fail) for text in (run / "log.jsonl").open()]
        assert records[0]["not_finite"] == 0 and records[-1]["loss"] is None
        counts.append([record["not_finite"] for record in records if record["not_finite"]])
    assert counts == [[1, 2, 3], [1, 2, 3, 4, 5]]
    keys = [row["key"] for row in read_run_ledger(run) if row["reason"] == "not_finite"]
    assert len(keys) == sum(record["dialogues"] for record in records if record["not_finite"])
