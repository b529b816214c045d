"""lmms-eval itself runs a local task with our model, and counts as our own scorer does, item by item."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.helpers.model.torchvision_import import import_torchvision

import_torchvision()  # before anything imports transformers
pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance  # noqa: E402

from benchmarks.model import lmms_eval as lmms  # noqa: E402
from framestream.pipeline import load_manifest  # noqa: E402
from framestream.pipeline.config.schema import to_dict  # noqa: E402
from framestream.pipeline.evaluation.file_questions import FileQuestions  # noqa: E402
from framestream.trainer import evaluate  # noqa: E402
from framestream.trainer.lmms_plugin import SimpleModel  # noqa: E402
from framestream.trainer.model.video_llm import build_model  # noqa: E402
from framestream.trainer.weights.load import initialize, save_weights  # noqa: E402
from tests.helpers.corpora import training_corpus as corpus  # noqa: E402

pytestmark = pytest.mark.peers
OPTIONS = list(corpus.COLOURS)
START = """\
from tests.helpers.model.torchvision_import import import_torchvision

import_torchvision()
"""
ROUNDS = """\
def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return doc["media"], "And what else?", False, previous_output, None


def count(doc, results):
    return {"rounds": float(len(results[0]))}
"""
SEVERAL = """\
include: choice.yaml
task: several
output_type: generate_until_multi_round
doc_to_text: !function rounds.text
process_results: !function rounds.count
metric_list:
  - {metric: rounds, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was never trained, its questions as an annotation file, and tasks about the same."""
    path = corpus.make(tmp_path_factory.mktemp("lmms"), videos=3)
    manifest, folder = load_manifest(path), path.parent
    model = build_model(manifest)
    initialize(model, manifest)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(30)
    run = Path(manifest.output)
    save_weights(model, run / "final", manifest)
    (run / "manifest.yaml").write_text(yaml.safe_dump(to_dict(manifest)))
    samples = json.loads((folder / "val.json").read_text())
    (folder / "asked.json").write_text(json.dumps([{**sample, "options": OPTIONS} for sample in samples]))
    questions = FileQuestions(manifest, folder / "asked.json", folder / "media")
    docs = lmms.docs_of(questions, [questions[i].key for i in range(len(questions))])
    lmms.write_task(folder / "tasks", docs, manifest.evaluate.max_new_tokens)
    (folder / "start").mkdir()
    (folder / "start" / "sitecustomize.py").write_text(START)
    (folder / "tasks" / "rounds.py").write_text(ROUNDS)
    (folder / "tasks" / "several.yaml").write_text(SEVERAL)
    return run


@pytest.fixture
def scored(run, monkeypatch) -> Callable[[str, bool], tuple[dict, list[dict]]]:
    """lmms-eval's results and samples of a task, of the simple kind or not."""
    monkeypatch.setenv("PYTHONPATH", f"{run.parent / 'start'}{os.pathsep}{corpus.PROJECT}")

    def score(task: str, simple: bool) -> tuple[dict, list[dict]]:
        return lmms.run_task({"checkpoint": run}, run.parent / "tasks", task, simple, run.parent / f"{task}-{simple}")

    return score


@pytest.mark.parametrize("simple", [True, False])
def test_lmms_eval_counts_as_our_own_scorer_does(run, scored, simple):
    folder = run.parent
    out = folder / "evaluation.json"
    words = ("--annotations", str(folder / "asked.json"), "--root", str(folder / "media"), "--out", str(out))
    assert evaluate.main(["--manifest", str(folder / "manifest.yaml"), *words]) == 0
    ours = json.loads(out.read_text())["answers"]
    result, samples = scored(lmms.TASK, simple)
    assert [(sample["doc_id"], sample["input"]) for sample in samples] == [
        (number, row["question"]) for number, row in enumerate(ours)
    ]
    assert [sample["filtered_resps"] for sample in samples] == [row["own"] for row in ours]
    assert len({row["own"] for row in ours}) > 1
    accuracy = sum(row["own"].lower() == row["expected"] for row in ours) / len(ours)
    assert result["exact_match,none"] == pytest.approx(accuracy)


def test_rounds_are_asked_until_the_task_ends_them(scored):
    result, samples = scored("several", False)
    assert result["rounds,none"] == 2 and len(samples) == 6


def test_the_least_loss_is_that_of_the_likeliest_option(run):
    """lmms-eval 0.7.3 makes text of likelihoods before it counts them, so that its own run ends with an error."""
    rows = json.loads((run.parent / "evaluation.json").read_text())["answers"]
    docs = [json.loads(line) for line in (run.parent / "tasks" / "docs.jsonl").open()]
    model = SimpleModel(checkpoint=str(run))
    model.task_dict = {"likely": {"test": docs}}
    requests = [
        Instance(
            request_type="loglikelihood",
            arguments=(doc["question"], f" {option}", _media, number, "likely", "test"),
            idx=0,
            metadata={"task": "likely", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
        for option in OPTIONS
    ]
    losses = np.array([loss for loss, _ in model.loglikelihood(requests)]).reshape(len(docs), -1)
    assert [OPTIONS[place] for place in losses.argmin(axis=1)] == [row["likeliest"]["own"] for row in rows]


def _media(doc: dict) -> list[str]:
    return doc["media"]
