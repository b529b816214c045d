"""Scoring through its command line: shards and annotation files, both methods, both controls."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from framestream.pipeline import Questions, load_manifest
from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.utils.locks import lock_folder
from framestream.trainer import evaluate
from framestream.trainer.evaluation import scorer
from framestream.trainer.evaluation.run_files import BLIND_FIELDS
from framestream.trainer.weights.load import load_pretrained
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.html_page import Page
from tests.helpers.model.weights import write_untrained_run

OPTIONS = list(corpus.COLOURS)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A manifest with shards, a model that was never trained, and questions of the held-out videos with options."""
    folder = tmp_path_factory.mktemp("evaluate")
    path = write_untrained_run(folder, videos=4)
    samples = json.loads((folder / "val.json").read_text())
    (folder / "asked.json").write_text(json.dumps([{**sample, "options": OPTIONS} for sample in samples]))
    return path


def asked(made: Path, *words: str) -> dict:
    out = made.parent / "evaluation.json"
    assert evaluate.main(["--manifest", str(made), "--out", str(out), *words]) == 0
    return json.loads(out.read_text())


def files(made: Path, name: str = "asked.json") -> tuple[str, ...]:
    return "--annotations", str(made.parent / name), "--root", str(made.parent / "media")


def turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def moments(samples: list[dict]) -> list[dict]:
    """Two questions for intervals: one says them in its annotation, one in its answer."""
    rows = []
    for number, answer in ((0, "at the beginning"), (2, "2.5 - 3.5 seconds")):
        row = {key: value for key, value in samples[number].items() if key != "options"}
        rows.append({**row, "id": f"m{number}", "family": "moments", "conversations": turns("When is it?", answer)})
    rows[0] |= {"intervals": [[2, 3], [1, 3]], "start": 1, "end": 4}
    return rows


def test_intervals_have_an_iou_in_place_of_being_right(made, monkeypatch, capsys):
    """The model says 0.5 - 2 seconds of what it is shown, which is 1.5 - 3 seconds of the clip's video."""
    samples = json.loads((made.parent / "val.json").read_text())
    rows = [*samples[:3], *moments(samples), {**moments(samples)[0], "id": "outside", "intervals": [[90, 95]]}]
    image = [{"from": "human", "value": "<image>\nWhen?"}, {"from": "gpt", "value": "now"}]
    rows.append({"id": "image", "image": "s0.png", "family": "moments", "intervals": [[1, 2]], "conversations": image})
    (made.parent / "moments.json").write_text(json.dumps(rows))
    questions = FileQuestions(load_manifest(made), made.parent / "val.json", made.parent / "media")
    reply = questions.chat_template.tokenizer.encode("It happens in 0.5 - 2 seconds.", add_special_tokens=False)
    monkeypatch.setattr(scorer, "generate_from_prefill", lambda model, state, keys, *_: [reply for _ in keys])
    html = made.parent / "moments.html"
    result = asked(made, *files(made, "moments.json"), "--html", str(html))
    assert [row["family"] for row in result["families"]] == ["colour"]
    (row,) = result["grounding"]
    by_key = {answer["key"].split(":")[-1]: answer for answer in result["answers"]}
    clip, other = by_key["m0"], by_key["m2"]
    assert clip["intervals"]["own"] == pytest.approx([1.5, 3]) and clip["iou"]["own"] == pytest.approx(0.75)
    assert other["intervals"]["expected"] == [[2.5, 3.5]] and other["iou"] == dict.fromkeys(clip["iou"], 0.0)
    assert row["questions"] == 2 and row["miou"] == pytest.approx(37.5) and row["recall_0.7"] == 50.0
    told = "\n".join(result["unreadable"])
    assert "[(90.0, 95.0)] are not in what is shown of the video, 1.00 s to 4.00 s" in told
    assert "must show one video" in told
    said = capsys.readouterr().out
    assert "family, by intervals" in said and "37.5" in said
    page = Page(html.read_text()).cells()
    assert "mIoU, %" in page and "(IoU 0.75)" in html.read_text()


def test_files_are_scored_as_shards_are(made, capsys):
    html = made.parent / "scores.html"
    shards, loose = asked(made), asked(made, *files(made), "--html", str(html))
    mine, theirs = ({(row["question"], row["expected"], row["own"]) for row in r["answers"]} for r in (loose, shards))
    assert mine == theirs and len(shards["answers"]) == len(loose["answers"]) == 8
    assert [row["method"] for row in shards["families"]] == ["generation"]
    assert [row["method"] for row in loose["families"]] == ["generation", "likelihood"]
    assert "likelihood" in capsys.readouterr().out and "--root" in loose["command"]
    text = Page(html.read_text()).cells()
    assert "likelihood" in text and "shuffled" in text and "Which colour is it?" in text


def test_two_ranks_write_what_one_process_writes(made):
    """Byte for byte, with questions that cannot be shown. The ranks compute on the stand-in device if there is one."""
    samples = json.loads((made.parent / "asked.json").read_text())
    samples[3]["video"] = samples[5]["video"] = "gone.mp4"
    samples += moments(samples)
    (made.parent / "some.json").write_text(json.dumps(samples))
    words = [*files(made, "some.json"), "--set", "evaluate.batch=3"]
    alone, out = asked(made, *words), made.parent / "evaluation.json"
    written = out.read_bytes()
    out.unlink()
    ranks = ["torchrun", "--standalone", "--nproc_per_node", "2", "-m", "trainer.evaluate"]
    done = corpus.run(*corpus.on_device([*ranks, "--manifest", str(made), "--out", str(out), *words]))
    assert out.read_bytes() == written and len(alone["unreadable"]) == 2 and len(alone["answers"]) == 8
    assert [(row["family"], row["questions"], row["unparsed"]) for row in alone["grounding"]] == [("moments", 2, 2)]
    assert done.stdout.splitlines().count(str(out)) == 1 and len(list(made.parent.glob("evaluation.json*"))) == 1


def test_the_likeliest_option_is_that_of_whole_dialogues(made):
    manifest = load_manifest(made)
    questions = FileQuestions(manifest, made.parent / "asked.json", made.parent / "media")
    result, model = asked(made, *files(made)), load_pretrained(Path(manifest.output) / "final")
    by_key = {row["key"]: row for row in result["answers"]}
    for i in range(3):
        row, logs = questions.prompt(i), []
        for option in OPTIONS:
            ids = questions.chat_template.answer_ids(option)
            whole = torch.cat([row.input_ids, torch.tensor(ids)])
            length = len(whole)
            more = {"input_ids": whole, "position_ids": torch.arange(length)}
            more["labels"] = torch.tensor([-100] * len(row.input_ids) + ids)
            more["token_weight"] = torch.ones(length)
            more["cu_seqlens"], more["lengths"] = torch.tensor([0, length], dtype=torch.int32), [length]
            more["label_positions"] = torch.arange(length - len(ids), length) - 1
            with torch.no_grad():
                logs.append(-float(model(dataclasses.replace(row, **more))))
        assert by_key[questions[i].key]["likeliest"]["own"] == OPTIONS[int(np.argmax(logs))]


def test_controls_show_other_frames_and_another_order(made):
    questions = Questions(load_manifest(made))
    own, rng = questions.prompt(0), np.random.default_rng(0)
    shuffled = questions.prompt(0, shuffle=rng)
    flat = [batch.clips.flatten(0, 1).numpy() for batch in (own, shuffled)]
    assert not np.array_equal(*flat) and own.input_ids.tolist() == shuffled.input_ids.tolist()
    ordered = [sorted(frame.tobytes() for frame in frames) for frames in flat]
    assert ordered[0] == ordered[1]


def test_what_cannot_be_shown_is_left_out_and_named(made, capsys):
    folder = made.parent
    samples = json.loads((folder / "asked.json").read_text())
    (folder / "media" / "cut.mp4").write_bytes((folder / "media" / "v0.mp4").read_bytes()[:700])
    (folder / "media" / "away.mp4").symlink_to("/etc/hostname")
    for number, name in enumerate(("cut.mp4", "../all.json", "away.mp4", "gone.mp4")):
        samples.append({**samples[number], "id": f"bad{number}", "video": name})
    (folder / "bad.json").write_text(json.dumps(samples))
    result = asked(made, *files(made, "bad.json"))
    told = " ".join(result["unreadable"])
    assert len(result["answers"]) < 12 and result["families"][0]["questions"] == len(result["answers"])
    assert "../all.json" in told and "away.mp4" in told and "cut.mp4" in told and "gone.mp4" in told
    counted = f"{len(result['unreadable'])} left out, each with its reason in `unreadable` of {folder}"
    assert len(result["unreadable"]) > 3 and counted in capsys.readouterr().out


def test_a_checkpoint_is_scored_at_the_manifests_frame_size(made, caplog):
    """A larger picture is another position table, and weights go on as they are. One warning says so."""
    result = asked(made, *files(made), "--set", "frames.size=160", "--limit", "1")
    assert len(result["answers"]) == 1
    trained = load_manifest(made).frames.size
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.endswith(f"config.json: frames.size is {trained}; the manifest's 160 is used")


def test_a_limit_does_not_change_what_is_asked_of_a_question(made):
    whole, first = asked(made, *files(made)), asked(made, *files(made), "--limit", "1")
    assert first["answers"] == whole["answers"][:1]


def test_what_cannot_be_right_or_compared_is_said(made, tmp_path, capsys):
    samples = json.loads((made.parent / "val.json").read_text())
    samples[0]["family"] = "alone"  # with the next one, a family about one video
    samples.append({**samples[0], "id": "same", "conversations": turns("What else?", "noise")})
    samples.append({"id": "two", "image": ["s0.png", "s1.png"], "conversations": turns("<image>Which?", "both")})
    samples[-1]["family"] = "colour"  # all others there show less
    samples[1]["conversations"][1]["value"] = "red " * 40
    (tmp_path / "some.json").write_text(json.dumps(samples))
    out = tmp_path / "new" / "evaluation.json"
    words = [
        "--manifest",
        str(made),
        "--annotations",
        str(tmp_path / "some.json"),
        "--root",
        str(made.parent / "media"),
    ]
    assert evaluate.main([*words, "--out", str(out), "--html", str(tmp_path / "scores.html")]) == 0
    said = capsys.readouterr().out
    assert (
        "1 not asked" in said
        and "(no blind control): colour" in said
        and "what is asked about: alone" in said
        and "1 expected answers have more tokens than" in said
    )
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    result = json.loads(out.read_text())
    assert str(out) in said.splitlines() and result["without_partner"] == ["colour"]
    assert result["without_blind"] == ["alone"] and len(result["answers"]) == 9
    (row,) = (row for row in result["families"] if row["family"] == "alone")
    assert [row[name] for name in BLIND_FIELDS] == [None] * 6 and row["questions"] == 2
    assert [line.split()[4] for line in said.splitlines() if line.startswith("alone ")] == ["none"]
    asked_blind = {row["family"] for row in result["answers"] if row["blind"] is not None}
    assert asked_blind == {"colour"} and all(row["shuffled"] is not None for row in result["answers"])
    page = Page((tmp_path / "scores.html").read_text()).cells()
    assert "none" in page and "There is no blind control where" in page and "blind: none" in page


def test_options_that_cannot_be_chosen_from_are_left_out_and_named(made):
    folder = made.parent
    samples = json.loads((folder / "asked.json").read_text())
    for sample, options in zip(samples, ("red", ["red"], [["red"], "blue"], ["one", "two"]), strict=False):
        sample["options"] = options
    (folder / "options.json").write_text(json.dumps(samples))
    result = asked(made, *files(made, "options.json"))
    assert len(result["answers"]) == len(samples) - 4 and len(result["unreadable"]) == 4
    told = "\n".join(result["unreadable"])
    assert told.count("must be a list of at least two answers") == 3 and "options.json: sample 0: " in told
    assert "is not one of its options, one, two" in told


def test_families_and_options_of_any_form_are_right_or_left_out(made):
    samples = json.loads((made.parent / "val.json").read_text())
    changes = [
        *({"family": name} for name in (["list"], {"a": 1}, True, "f" * 201)),
        *({"options": found} for found in ("AB", {"A": "x"}, ["red", "red", "blue"], ["", "red"], [None, "red"])),
        *({"options": found} for found in (["red", "blue"] * 40, ["red", "w " * 2000])),
        *({"family": 0} for _ in range(2)),
        *({"options": [1, 2.5, "red", "green", "blue", "yellow"], "family": "num"} for _ in range(2)),
    ]
    other = next(s for s in samples if s["conversations"][1] != samples[0]["conversations"][1])
    asks = [{**(samples[0], other)[n % 2], **change, "id": n} for n, change in enumerate(changes)]
    (made.parent / "odd.json").write_text(json.dumps(asks))
    result = asked(made, *files(made, "odd.json"))
    assert [line.split(": ")[2] for line in result["unreadable"]] == ["family"] * 4 + ["options"] * 7
    assert {row["family"] for row in result["families"]} == {"0", "num"} and len(result["answers"]) == 4


def test_scores_of_other_weights_do_not_replace_those_of_a_run(made, tmp_path, capsys, monkeypatch):
    """They stand beside the weights that are scored. Weights that belong to no run need a file of results."""
    run, other = Path(load_manifest(made).output), tmp_path / "other"
    (run / "evaluation.json").write_text("of the run")
    shutil.copytree(run / "final", other / "final")
    shutil.copytree(run / "final", tmp_path / "copied")
    words = ["--manifest", str(made), "--limit", "1"]
    assert evaluate.main([*words, "--checkpoint", str(other)]) == 0
    assert json.loads((other / "evaluation.json").read_text())["checkpoint"] == str(other / "final")
    monkeypatch.chdir(other / "final")
    assert evaluate.main([*words, *files(made), "--checkpoint", "."]) == 0
    assert (other / "evaluation-asked.json").is_file() and (run / "evaluation.json").read_text() == "of the run"
    capsys.readouterr()
    monkeypatch.setattr(scorer, "evaluate", None)
    assert evaluate.main([*words, "--checkpoint", str(tmp_path / "copied")]) == 2
    fault = f"error: {tmp_path / 'copied'}: these weights belong to no run; name the file of results with --out\n"
    assert capsys.readouterr().err == fault
    assert not list(tmp_path.glob("*.json*")) and (run / "evaluation.json").read_text() == "of the run"
    (run / "evaluation.json").unlink()


def test_results_are_written_where_nobody_reads_the_output(made, tmp_path):
    out = tmp_path / "evaluation.json"
    command = [sys.executable, "-m", "trainer.evaluate", "--manifest", str(made), "--limit", "1", "--out", str(out)]
    environment = corpus.environment() | {"PYTHONIOENCODING": "latin-1"}
    process = subprocess.Popen(
        command, env=environment, cwd=corpus.PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait() == 141 and "Traceback" not in said and "Broken" not in said
    process.stderr.close()
    assert json.loads(out.read_text())["answers"]


def test_unwritable_results_are_said_before_anything_is_asked(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scorer, "evaluate", None)
    (tmp_path / "file").write_text("")
    for out, why in ((tmp_path, "is a folder"), (tmp_path / "file" / "a.json", "cannot be written, because of")):
        assert evaluate.main(["--manifest", str(made), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {out}: {why}") and said.count("\n") == 1


def test_a_second_evaluation_to_the_same_file_is_refused(made, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scorer, "evaluate", None)
    out = tmp_path / "results" / "evaluation.json"
    with lock_folder(out.parent, "evaluation.json.lock", "evaluation to evaluation.json"):
        assert evaluate.main(["--manifest", str(made), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: {out.parent}: another evaluation to evaluation.json is running here")
        assert said.count("\n") == 1 and "--out" in said


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--annotations", "a.json"), 2, "belong together"),
        (("--annotations", "gone.json", "--root", "."), 2, "gone.json"),
        (("--checkpoint", "gone"), 1, "no weights there"),
        (("--set", "output=gone"), 1, "train it first, python -m trainer --manifest"),
        (("--set", "evaluate.batch=0"), 2, "evaluate.batch"),
    ],
)
def test_bad_input_is_one_clear_line(made, tmp_path, capsys, words, status, message):
    out = tmp_path / "evaluation.json"
    assert evaluate.main(["--manifest", str(made), "--out", str(out), *words]) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said and not out.exists()


@pytest.mark.parametrize("limit", ["0", "-1", "x", "1.5"])
def test_a_limit_that_asks_nothing_is_refused(made, capsys, limit):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main(["--manifest", str(made), f"--limit={limit}"])
    assert "--limit: must be a whole number from 1" in capsys.readouterr().err


def test_ctrl_c_has_its_status_and_writes_nothing(made, tmp_path, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scorer, "evaluate", interrupted)
    out = tmp_path / "evaluation.json"
    assert evaluate.main(["--manifest", str(made), "--out", str(out)]) == 130
    assert capsys.readouterr().err == "stopped; nothing was written\n" and not out.exists()


def test_an_empty_annotation_file_is_named(made, capsys):
    (made.parent / "none.json").write_text(yaml.safe_dump([]))
    assert evaluate.main(["--manifest", str(made), *files(made, "none.json")]) == 2
    assert "none.json: no samples with an answer found" in capsys.readouterr().err
