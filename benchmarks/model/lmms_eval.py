"""Compare lmms-eval with ``python -m trainer.evaluate``, answer by answer on the same questions and model.

    python -m benchmarks.model.lmms_eval --checkpoint demo/runs/stage4 \\
        --annotations demo/data/annotations/heldout-first-colour.jsonl --root demo/data/media

Needs lmms-eval and this project in one environment (docs/evaluation.md). Writes an offline multiple-choice task with
the questions as worded in the annotation file. lmms-eval runs it as a task of the simple and of the chat kind, and
scores it with its own ``exact_match``. The options of a question without ``options`` are the answers of its family in
the file. Exits with 1 if an answer or its score differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.evaluation.questions import Question, QuestionSource
from framestream.trainer.evaluation.metrics import is_correct
from framestream.trainer.evaluation.scorer import evaluate
from framestream.trainer.inference.predictor import resolve_run

TASK = "choice"
YAML = """\
task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {docs}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_choice: options
doc_to_target: target
generation_kwargs: {{max_new_tokens: {tokens}, do_sample: false, until: []}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true, ignore_punctuation: true}}
"""
UTILS = """\
def visual(doc):
    return doc["media"]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]
"""


class Answer(NamedTuple):
    """An answer, and whether it is scored as correct."""

    text: str
    is_correct: bool


def docs_of(questions: QuestionSource | Sequence[Question], keys: Sequence[str]) -> list[dict]:
    """Return the questions with ``keys`` as lmms-eval's documents, in that order.

    Raises:
        SystemExit: a question follows earlier turns, is about a part of a video, or its answer is not an option.
    """
    asked = {question.key: question for question in (questions[i] for i in range(len(questions)))}
    families: dict[str, dict[str, None]] = {}
    for question in asked.values():
        families.setdefault(question.family, {})[question.answer] = None
    docs = []
    for key in keys:
        question = asked[key]
        if len(question.turns) > 1 or any((file.start, file.end) != (None, None) for file in question.media):
            raise SystemExit(f"{key}: not one turn about whole files; choose another annotation file")
        options = question.options or list(families[question.family])
        if question.answer not in options:
            raise SystemExit(f"{key}: {question.answer!r} is not one of its options; correct the annotation file")
        media = [str(file.path) for file in question.media]
        doc = {"key": key, "question": question.text, "media": media}
        docs.append({**doc, "options": options, "target": options.index(question.answer)})
    return docs


def write_task(folder: Path, docs: Sequence[dict], tokens: int) -> None:
    """Write the task :data:`TASK` with ``docs`` into ``folder``; answers have at most ``tokens`` tokens."""
    folder.mkdir()
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (folder / "utils.py").write_text(UTILS, encoding="utf-8")
    yaml = YAML.format(docs=json.dumps(str(folder / "docs.jsonl")), tokens=tokens)
    (folder / f"{TASK}.yaml").write_text(yaml, encoding="utf-8")


def run_task(model: dict[str, Path], folder: Path, task: str, simple: bool, out: Path) -> tuple[dict, list[dict]]:
    """Run a ``task`` in ``folder`` offline with lmms-eval; return results, and samples in document order.

    Args:
        model: arguments of the model, such as ``checkpoint``.
        simple: run it as a task of the simple kind; otherwise of the chat kind.
        out: new folder for the output of lmms-eval.

    Raises:
        SystemExit: lmms-eval ended with an error, which is shown.
    """
    words = ",".join(f"{name}={value}" for name, value in model.items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "framestream", "--model_args", words]
    command += ["--tasks", task, "--include_path", str(folder), "--batch_size", "1", "--log_samples"]
    command += ["--output_path", str(out), *(["--force_simple"] if simple else [])]
    environment = os.environ | {"HF_HOME": str(out / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = list(out.rglob("*_results.json"))
    if done.returncode or len(found) != 1:
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    (samples,) = out.rglob(f"*_samples_{task}.jsonl")
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    results = json.loads(found[0].read_text(encoding="utf-8"))["results"][task]
    return results, sorted(lines, key=lambda line: line["doc_id"])


def differing(ours: Mapping[str, Answer], theirs: Mapping[str, Answer]) -> list[str]:
    """Return keys of the questions whose answers or scores differ, or that only one side answered."""
    return [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]


def accuracy(answers: Mapping[str, Answer]) -> float:
    """Return the share of correct answers."""
    return sum(answer.is_correct for answer in answers.values()) / len(answers)


def main(arguments: list[str] | None = None) -> int:
    """Ask both sides and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="finished run, or folder of weights")
    parser.add_argument("--manifest", type=Path, help="YAML of the stage; default: the run's own")
    parser.add_argument("--annotations", type=Path, required=True, help="questions about whole files")
    parser.add_argument("--root", type=Path, required=True, help="folder that media paths are relative to")
    parser.add_argument("--limit", type=int, help="ask only the first LIMIT questions of each family")
    options = parser.parse_args(arguments)
    weights, manifest = resolve_run(options.checkpoint, options.manifest)
    model = {"checkpoint": options.checkpoint} | ({"manifest": options.manifest} if options.manifest else {})
    questions = FileQuestions(manifest, options.annotations, options.root)
    rows = evaluate(manifest, weights, questions, options.limit, controls=("blind",), examples=0)["answers"]
    ours = {row["key"]: Answer(row["own"], is_correct(row["own"], row["expected"])) for row in rows}
    print(f"{options.annotations.name}: {len(ours)} of {len(questions)} questions")
    print("| | accuracy | answers that differ |\n| --- | --- | --- |")
    print(f"| framestream.trainer.evaluate | {100 * accuracy(ours):.2f} | |")
    same = True
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "tasks"
        asked = list(ours)
        write_task(tasks, docs_of(questions, asked), manifest.evaluate.max_new_tokens)
        for kind in ("simple", "chat"):
            results, samples = run_task(model, tasks, TASK, kind == "simple", Path(folder) / kind)
            theirs = {asked[s["doc_id"]]: Answer(s["filtered_resps"], bool(s["exact_match"])) for s in samples}
            keys, share = differing(ours, theirs), results["exact_match,none"]
            print(f"| lmms-eval, {kind} | {100 * share:.2f} | {len(keys)} |")
            for key in keys:
                print(f"{key}: {ours.get(key)} here, {theirs.get(key)} by lmms-eval", file=sys.stderr)
            same &= not keys and math.isclose(share, accuracy(ours))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
