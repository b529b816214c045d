"""lmms-eval itself runs a local task with our model, and counts as our own scorer does, item by item."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("lmms_eval")
from lmms_eval.api.instance import Instance

from pipeline import load_manifest
from pipeline.manifest import plain
from tests.trainer import corpus
from trainer import evaluate
from trainer.lmms import SimpleModel
from trainer.model.video_llm import build_model
from trainer.weights import initialise, save

pytestmark = pytest.mark.peers
OPTIONS = list(corpus.COLOURS)

UTILS = """
from pathlib import Path
MEDIA = Path({media!r})
def visual(doc):
    return [str(MEDIA / doc["video"])]
def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 2:
        return None, None, True, previous_output, None
    return visual(doc), "And what else?", False, previous_output, None
def right(doc, results):
    given = results[0]
    return {{"exact": float(given.strip().lower() == doc["answer"])}}
def rounds(doc, results):
    return {{"rounds": float(len(results[0]))}}
def mean(values):
    return sum(values) / len(values)
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
    rows = []
    for sample in samples:
        question, answer = (turn["value"].replace("<image>\n", "") for turn in sample["conversations"])
        rows.append({"video": sample["video"], "question": question, "answer": answer, "options": OPTIONS})
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "utils.py").write_text(UTILS.format(media=str(folder / "media")))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tasks / "rows.jsonl"}}}}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
"""
    generation = "generation_kwargs: {max_new_tokens: 16, temperature: 0, do_sample: false}\n"
    kinds = {
        "asked": ("generate_until", "exact", "right", generation),
        "several": ("generate_until_multi_round", "rounds", "rounds", generation),
    }
    for name, (output, metric, process, more) in kinds.items():
        text = f"{common}task: {name}\noutput_type: {output}\nprocess_results: !function utils.{process}\n{more}"
        metrics = f"  - {{metric: {metric}, aggregation: !function utils.mean, higher_is_better: true}}\n"
        (tasks / f"{name}.yaml").write_text(f"{text}metric_list:\n{metrics}")
    return run


def scored(run: Path, task: str, simple: bool) -> tuple[dict, list[dict]]:
    """lmms-eval's results and samples of a task."""
    out = run.parent / f"{task}-{simple}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "framestream", "--model_args", f"checkpoint={run}"]
    command += [
        "--tasks",
        task,
        "--include_path",
        str(run.parent / "tasks"),
        "--log_samples",
        "--output_path",
        str(out),
    ]
    command += ["--batch_size", "1", *(["--force_simple"] if simple else [])]
    environment = corpus.environment() | {"HF_HOME": str(run.parent / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, cwd=corpus.PROJECT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob(f"*_samples_{task}.jsonl")
    return json.loads(results.read_text())["results"][task], [json.loads(line) for line in samples.open()]


@pytest.mark.parametrize("simple", [True, False])
def test_lmms_eval_counts_as_our_own_scorer_does(run, simple):
    folder = run.parent
    out = folder / "evaluation.json"
    words = ("--annotations", str(folder / "asked.json"), "--root", str(folder / "media"), "--out", str(out))
    assert evaluate.main(["--manifest", str(folder / "manifest.yaml"), *words]) == 0
    ours = json.loads(out.read_text())["answers"]
    result, samples = scored(run, "asked", simple)
    given = {sample["doc_id"]: sample["filtered_resps"] for sample in samples}
    assert [given[number] for number in range(len(ours))] == [row["own"] for row in ours]
    assert len({row["own"] for row in ours}) > 1
    accuracy = sum(row["own"].lower() == row["expected"] for row in ours) / len(ours)
    assert result["exact,none"] == pytest.approx(accuracy)


def test_rounds_are_asked_until_the_task_ends_them(run):
    result, samples = scored(run, "several", False)
    assert result["rounds,none"] == 2 and len(samples) == 6


def test_the_least_loss_is_that_of_the_likeliest_option(run):
    """lmms-eval 0.7.3 makes text of likelihoods before it counts them, so that its own run ends with an error."""
    rows = json.loads((run.parent / "evaluation.json").read_text())["answers"]
    docs = [json.loads(line) for line in (run.parent / "tasks" / "rows.jsonl").open()]
    model = SimpleModel(checkpoint=str(run))
    model.task_dict = {"likely": {"test": docs}}
    requests = [
        Instance(
            request_type="loglikelihood",
            arguments=(doc["question"], f" {option}", _media_of(run), number, "likely", "test"),
            idx=0,
            metadata={"task": "likely", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
        for option in OPTIONS
    ]
    losses = np.array([loss for loss, _ in model.loglikelihood(requests)]).reshape(len(docs), -1)
    assert [OPTIONS[place] for place in losses.argmin(axis=1)] == [row["likeliest"]["own"] for row in rows]


def _media_of(run: Path):
    return lambda doc: [str(run.parent / "media" / doc["video"])]
