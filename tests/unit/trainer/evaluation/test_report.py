"""The report page, read back with an HTML parser of the standard library."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from framestream.pipeline.shards.ledger import REASONS
from framestream.trainer import report
from framestream.trainer.evaluation.run_files import ReportError
from framestream.trainer.evaluation.run_report import read_run, render, summary
from tests.helpers.html_page import Page


def jpeg() -> str:
    stored = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(stored, "JPEG")
    return base64.b64encode(stored.getvalue()).decode("ascii")


def write_run(folder: Path, steps: int = 40, scores: bool = False) -> Path:
    folder.mkdir()
    with (folder / "log.jsonl").open("w") as log:
        for step in range(1, steps + 1):
            record = {"step": step, "steps": 40, "loss": 4.0 / step, "lr": {"connector": 1e-3 / step}, "seconds": 0.5}
            record |= {"grad_norm": 1.0, "tokens_per_s": 1234.0, "frames_per_s": 56.0, "data_wait": 0.125}
            record |= {"dialogues": 16, "skipped": 0, "tflops": 200.0, "mfu": 0.25 if scores else None}
            record |= {"peak_memory": 3 * 2**29, "not_finite": 0}
            if scores and step >= 20:
                record |= {"not_finite": 1} | ({"loss": None, "grad_norm": None} if step == 20 else {})
            log.write(json.dumps(record) + "\n")
    manifest = {"stage": 2, "name": "<short> video", "frames": {"min": 4, "max": 8, "size": 128, "sampler": "middle"}}
    manifest["train"] = {"zero_stage": 3, "connector": {"train": True}, "language_model": {"train": False}}
    (folder / "manifest.yaml").write_text(json.dumps(manifest | {"init_from": {"run": "runs/stage1"}}))
    reasons = ["unreadable"] * 3 + ["x<y"]
    ledger = [
        {"key": f"d{i}", "reason": reason, "message": f"/media/{i}.mp4: <gone>"} for i, reason in enumerate(reasons)
    ]
    (folder / "ledger").mkdir()
    for rank in (0, 1):
        lines = "".join(json.dumps(row) + "\n" for row in ledger[rank::2])
        (folder / "ledger" / f"rank00{rank}.jsonl").write_text(lines)
    if scores:
        row = {"family": "first colour", "questions": 224, "accuracy": 93.3, "low": 90.1, "high": 96.2, "blind": 12.1}
        row |= {"method": "generation", "shuffled": 51.7, "shuffled_low": 44.4, "shuffled_high": 58.8}
        row |= {"blind_low": 8.0, "blind_high": 16.5, "gain": 81.2, "gain_low": 76.0, "gain_high": 86.4}
        example = {
            "family": "first colour",
            "question": "Which <b>colour</b>?",
            "expected": "red",
            "frames_jpeg": [jpeg()],
        }
        examples = [example | {"given": "Red.", "blind_given": "blue"}, example | {"given": "", "blind_given": "</p>"}]
        evaluation = {
            "unreadable": [],
            "families": [row],
            "examples": examples,
            "checkpoint": "runs/final",
            "command": "python -m x",
        }
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def test_page_holds_the_figures_and_nothing_from_elsewhere(tmp_path):
    runs = [write_run(tmp_path / "stage1", scores=False), write_run(tmp_path / "stage2", scores=True)]
    out = tmp_path / "deep" / "report.html"
    assert report.main([*map(str, runs), "--out", str(out)]) == 0
    page = Page(out.read_text(encoding="utf-8"))
    text = page.cells()
    for figure in (
        "93.3",
        "90.1 to 96.2",
        "12.1",
        "8.0 to 16.5",
        "81.2",
        "76.0 to 86.4",
        "51.7",
        "44.4 to 58.8",
        "224",
        "1.23k",
        "12.5 %",
    ):
        assert figure in text, figure
    assert "4 dialogues left out of training, or cut: 3 × unreadable, 1 × x<y" in text
    assert "every dialogue could be read" not in text and "d0 /media/0.mp4: <gone>; d2 /media" in text
    assert REASONS["unreadable"] in text
    assert "1.50 GiB" in text and "25.0 %" in text and summary(read_run(runs[0]))["mfu"] is None
    assert "1 step skipped, because loss or gradient was not finite" in text and "MFU, %" in text
    assert "runs/stage1" in text and "20.0 s" in text and "640" in text
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert links and all(link.startswith("data:image/jpeg;base64,") for link in links)
    for link in links:
        Image.open(io.BytesIO(base64.b64decode(link.partition(",")[2]))).load()
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "iframe")]


def test_validations_are_curves_and_the_best_is_named(tmp_path):
    folder = write_run(tmp_path / "run")
    assert "best validation" not in Page(render([read_run(folder)])).cells()
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for n, line in enumerate(lines[9::10]):
        line |= {"val_loss": 2.0 - n, "val_accuracy": 25.0 * n, "val_best": 2.0 - n, "val_best_step": line["step"]}
        line["val_families"] = {"side": 10.0 * n, "<count>": 50.0}
    lines[-1] |= {"val_loss": None, "val_best": 0.0, "val_best_step": 30}
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = render([read_run(folder)])
    assert "best validation after step 30: loss 0" in Page(page).cells()
    assert page.count("validation, %") and ">validation</text>" in page and ">accuracy</text>" in page
    assert "validation by family, %" in page and ">side</text>" in page and ">&lt;count&gt;</text>" in page
    for damage, words in (({"val_best_step": "x"}, "val_best_step is 'x'"), ({"val_families": {"a": 101}}, "val_fam")):
        (folder / "log.jsonl").write_text(json.dumps(lines[9] | damage) + "\n")
        with pytest.raises(ReportError, match=words):
            read_run(folder)


def test_data_text_is_escaped_and_answers_judged_as_scored(tmp_path):
    page = Page(render([read_run(write_run(tmp_path / "run", scores=True))]))
    text = page.cells()
    assert "Which <b>colour</b>?" in text and "blind: </p>" in text and "<short> video" in text
    assert "b" not in {tag for tag, _ in page.tags}
    assert "Red. ✓" in text and "(nothing) ✗" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ("log.jsonl", "train it first")),
        ("", ("log.jsonl", "no optimizer step")),
        ('{"step": 1, "seconds": 1}\n', ("log.jsonl", "lacks loss")),
        ('{"step": 1, "seco\n{"step": 2, "loss": 1, "seconds": 1}\n', ("log.jsonl", "line 1")),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path, capsys, content, words):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    out = tmp_path / "report.html"
    assert report.main([str(tmp_path), "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and all(word in message for word in words)
    assert not out.exists()


def test_the_line_that_is_being_written_is_left_out(tmp_path):
    run = write_run(tmp_path / "run", steps=7)
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 8, "lo')
    assert summary(read_run(run))["done"] == 7


def test_a_log_without_learning_rates_is_shown(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    del lines[1]["lr"]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "learning rate" in render([read_run(folder)])


def test_a_folder_in_place_of_scores_is_named(tmp_path):
    folder = write_run(tmp_path / "run", steps=3)
    (folder / "evaluation.json").mkdir()
    [fault] = read_run(folder).faults
    assert "evaluation.json: Is a directory; it is left out" in fault


def test_intervals_chains_and_costs_are_on_the_page(tmp_path):
    run = write_run(tmp_path / "stage4", scores=True)
    scores = json.loads((run / "evaluation.json").read_text())
    row = {**scores["families"][0], "family": "moments", "method": "intervals", "miou": 38.7, "unparsed": 3}
    del row["accuracy"]
    row |= {"recall_0.3": 61.0, "recall_0.5": 41.0, "recall_0.7": 31.0}
    (run / "evaluation.json").write_text(json.dumps(scores | {"grounding": [row]}))
    chains = {name: value for name, value in scores["families"][0].items() if not name.startswith("shuffled")}
    chains |= {"family": "32 frames, chains", "frames": 32, "chains": 50, "all_correct": 17, "kinds": {"caption": 55.5}}
    costs = {
        "family": "32 frames",
        "method": "prompts",
        "frames": 32,
        "prompts": 8,
        "seconds": 18.0,
        "peak_memory": 2**31,
    }
    found = {
        "families": [],
        "trained": None,
        "deepest": None,
        "trained_frames": 512,
        "chains": [chains],
        "costs": [costs],
    }
    (run / "haystack.json").write_text(json.dumps(found))
    text = Page(render([read_run(run)])).cells()
    for figure in ("moments", "38.7", "61.0", "31.0", "17 of 50", "caption 55.5", "2.25", "2.00"):
        assert figure in text, figure
    for name, bad in (("grounding", [{**row, "miou": 101}]), ("grounding", [{**row, "unparsed": None}])):
        (run / "evaluation.json").write_text(json.dumps(scores | {name: bad}))
        read = read_run(run)
        assert read.evaluation is None and "moments" in read.faults[-1]
    (run / "haystack.json").write_text(json.dumps(found | {"costs": [{**costs, "prompts": 0}]}))
    assert "prompts of '32 frames' is 0" in read_run(run).faults[-1]
    (run / "haystack.json").write_text(json.dumps(found | {"chains": [{**chains, "kinds": ["caption"]}]}))
    assert "kinds of '32 frames, chains' are no shares by name" in read_run(run).faults[-1]
