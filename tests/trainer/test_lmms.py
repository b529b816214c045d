"""lmms-eval itself runs a local task with our model, and counts as our own scorer does, item by item."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance

from benchmarks import lmms
from pipeline import load_manifest
from pipeline.file_questions import FileQuestions
from pipeline.manifest import plain
from tests.trainer import corpus
from trainer import evaluate
from trainer.lmms import SimpleModel
from trainer.model.video_llm import build_model
from trainer.weights import initialise, save

pytestmark = pytest.mark.peers
OPTIONS = list(corpus.COLOURS)
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
    initialise(model, manifest)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(30)
    run = Path(manifest.output)
    save(model, run / "final", manifest)
    (run / "manifest.yaml").write_text(yaml.safe_dump(plain(manifest)))
    samples = json.loads((folder / "val.json").read_text())
    (folder / "asked.json").write_text(json.dumps([{**sample, "options": OPTIONS} for sample in samples]))
    questions = FileQuestions(manifest, folder / "asked.json", folder / "media")
    docs = lmms.docs_of(questions, [questions[i].key for i in range(len(questions))])
    lmms.write_task(folder / "tasks", docs, manifest.evaluate.max_new_tokens)
    (folder / "tasks" / "rounds.py").write_text(ROUNDS)
    (folder / "tasks" / "several.yaml").write_text(SEVERAL)
    return run


def scored(run: Path, task: str, simple: bool) -> tuple[dict, list[dict]]:
    """lmms-eval's results and samples of a task."""
    out = run.parent / f"{task}-{simple}"
    return lmms.run_task({"checkpoint": run}, run.parent / "tasks", task, simple, out)


@pytest.mark.parametrize("simple", [True, False])
def test_lmms_eval_counts_as_our_own_scorer_does(run, simple):
    folder = run.parent
    out = folder / "evaluation.json"
    words = ("--annotations", str(folder / "asked.json"), "--root", str(folder / "media"), "--out", str(out))
    assert evaluate.main(["--manifest", str(folder / "manifest.yaml"), *words]) == 0
    ours = json.loads(out.read_text())["answers"]
    result, samples = scored(run, lmms.TASK, simple)
    assert [sample["doc"]["key"] for sample in samples] == [row["key"] for row in ours]
    assert [sample["filtered_resps"] for sample in samples] == [row["own"] for row in ours]
    assert len({row["own"] for row in ours}) > 1
    accuracy = sum(row["own"].lower() == row["expected"] for row in ours) / len(ours)
    assert result["exact_match,none"] == pytest.approx(accuracy)


def test_rounds_are_asked_until_the_task_ends_them(run):
    result, samples = scored(run, "several", False)
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
