"""Needles in haystacks through the command line: what is asked, what is counted, what is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.haystack import Haystack
from framestream.trainer import haystack
from framestream.trainer.inference.generation import generate
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, load_pretrained, save_weights
from tests.helpers.corpora.needles import DEPTHS, FRAMES, make, question
from tests.helpers.corpora.training_corpus import COLOURS
from tests.helpers.html_page import Page

TAKES_300 = ("--set", "model.language_model.max_position_embeddings=300", "--set", "text.max_tokens=300")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("haystack")


@pytest.fixture(scope="module")
def manifest(folder) -> Manifest:
    return make(folder)


@pytest.fixture(scope="module")
def weights(manifest, folder) -> Path:
    model = build_model(manifest)
    initialize(model, manifest)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(30)
    save_weights(model, folder / "final", manifest)
    return folder / "final"


def words(folder: Path, *more: str) -> list[str]:
    depths = [] if "--hops" in more else ["--depths", *map(str, DEPTHS)]
    asked = ["--manifest", str(folder / "manifest.yaml"), "--checkpoint", str(folder), "--root", str(folder)]
    asked += ["--needles", str(folder / "needles.json"), "--video", str(folder / "0.mp4")]
    return [*asked, "--frames", ",".join(map(str, FRAMES)), *depths, "--out", str(folder / "haystack.json"), *more]


def test_each_cell_counts_what_the_model_answers(weights, folder, manifest, capsys):
    assert haystack.main(words(folder, "--html", str(folder / "page.html"))) == 0
    result = json.loads((folder / "haystack.json").read_text())
    asked = Haystack(manifest, folder / "needles.json", folder, [folder / "0.mp4"], FRAMES, DEPTHS)
    model, end = load_pretrained(weights), asked.chat_template.tokenizer.eos_token_id
    by_key = {row["key"]: row for row in result["answers"]}
    assert len(by_key) == len(asked)
    for i in range(len(asked)):
        other = next(j for j in range(len(asked)) if asked[j].family == asked[i].family and j != i)
        for way, media_of in (("own", None), ("blind", other)):
            (tokens,) = generate(model, [asked.prompt(i, media_of)], manifest.evaluate.max_new_tokens, end)
            said = asked.chat_template.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert by_key[asked[i].key][way] == said
    found = {(row["frames"], row["depth"], row["method"]) for row in result["families"]}
    assert found == {(n, d, method) for n in FRAMES for d in DEPTHS for method in ("generation", "likelihood")}
    assert result["trained_frames"] == 8 and result["trained"]["questions"] == 2 * len(DEPTHS)
    assert result["deepest"]["family"] == "4 frames, 100 % deep" and result["deepest"]["questions"] == 2
    costs = {row["frames"]: row for row in result["costs"]}
    assert {count: row["prompts"] for count, row in costs.items()} == dict.fromkeys(FRAMES, 4 * len(DEPTHS))
    assert all(row["seconds"] > 0 and row["peak_memory"] > 2**20 for row in costs.values())
    said = capsys.readouterr().out
    assert "4 frames, 100 % deep" in said and "s/prompt" in said
    assert "up to 16 frames; the model was trained with at most 8" in said
    page = Page((folder / "page.html").read_text())
    titles = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert titles == {"accuracy, %", "blind, %"}
    assert sum(tag == "rect" for tag, _ in page.tags) == 2 * len(FRAMES) * len(DEPTHS)


def test_scores_of_other_weights_do_not_replace_those_of_a_run(weights, folder, tmp_path, capsys):
    (folder / "haystack.json").write_text("of the run")
    shutil.copytree(weights, tmp_path / "other" / "final")
    shutil.copytree(weights, tmp_path / "copied")
    asked = words(folder, "--limit", "1", "--frames", "4")
    del asked[asked.index("--out") : asked.index("--out") + 2]
    assert haystack.main([*asked, "--checkpoint", str(tmp_path / "other")]) == 0
    assert json.loads((tmp_path / "other" / "haystack.json").read_text())["answers"]
    capsys.readouterr()
    assert haystack.main([*asked, "--checkpoint", str(tmp_path / "copied")]) == 2
    assert "copied: these weights belong to no run; name the file of results with --out" in capsys.readouterr().err
    assert (folder / "haystack.json").read_text() == "of the run"


def test_what_the_model_does_not_take_is_left_out_by_name(weights, folder, capsys):
    assert haystack.main(words(folder, *TAKES_300)) == 0
    result = json.loads((folder / "haystack.json").read_text())
    assert {row["frames"] for row in result["families"]} == {4}
    (left_out,) = [line for line in result["unreadable"] if "the limit of the model is 300" in line]
    assert left_out.startswith("a prompt of 16 frames has ") and left_out.endswith("at most 8 frames fit")
    assert f"in `unreadable` of {folder / 'haystack.json'}; the first:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--frames", "6"), 2, "--frames 6"),
        (("--frames", "64"), 1, "has 32 frames"),
        (("--frames", "64,20000"), 1, "has 32 frames"),
        (("--frames", "20000"), 2, "a prompt of 20,000 frames has "),
        (("--hops", "2", "--depths", "50"), 2, "leave out --depths"),
        (("--hops", "9"), 2, "a chain of 9 hops needs 9 images"),
        ((*TAKES_300, "--frames", "16"), 2, "the limit of the model is 300"),
        (("--checkpoint", "gone"), 1, "no weights there"),
        (("--needles", "gone.json"), 2, "gone.json"),
    ],
)
def test_bad_input_is_one_clear_line(weights, folder, tmp_path, capsys, more, status, message):
    out = tmp_path / "haystack.json"
    assert haystack.main(words(folder, "--out", str(out), *more)) == status
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said and not out.exists()


@pytest.mark.parametrize(
    "more",
    [
        ("--depths", "101"),
        ("--depths", "nan"),
        ("--depths", "inf"),
        ("--frames", "0"),
        ("--frames", "4,-4"),
        ("--hops", "1"),
    ],
)
def test_frames_and_depths_have_bounds(folder, capsys, more):
    with pytest.raises(SystemExit, match="2"):
        haystack.main(words(folder, *more))
    said = capsys.readouterr().err
    assert said.startswith(f"error: argument {more[0]}: ") and said.count("\n") == 1


def test_a_bad_video_leaves_its_needles_to_the_others(weights, folder, tmp_path, capsys):
    (tmp_path / "cut.mp4").write_bytes((folder / "0.mp4").read_bytes()[:900])
    bad = ("--video", str(tmp_path / "cut.mp4"), "--video", str(tmp_path / "gone.mp4"))
    out = tmp_path / "haystack.json"
    assert haystack.main(words(folder, *bad, "--out", str(out))) == 0
    assert haystack.main(words(folder, "--out", str(tmp_path / "good.json"))) == 0
    result, good = (json.loads(path.read_text()) for path in (out, tmp_path / "good.json"))
    assert result["answers"] == good["answers"]
    more = result["unreadable"][len(good["unreadable"]) :]
    assert ["left out, other videos take its needles" in line for line in more] == [True, True]
    assert "cut.mp4" in more[0] and "gone.mp4" in more[1] and "4 left out" in capsys.readouterr().out


def test_more_frames_than_were_trained_are_not_called_trained(weights, folder):
    assert haystack.main(words(folder, "--frames", "16")) == 0
    result = json.loads((folder / "haystack.json").read_text())
    assert result["trained"] is None and result["deepest"] is None


def test_chains_are_scored_by_number_of_frames_and_kind(weights, folder, capsys):
    for name in ("green", "white"):
        Image.new("RGB", (300, 140), COLOURS[name]).save(folder / f"{name}.png")
    colors = ["red", "blue", "green", "white"]
    singles = [question(f"{name}.png", name, options=colors) for name in colors]
    (folder / "singles.json").write_text(json.dumps(singles))
    rows = [*singles]
    # every chain with another answer than the last one has an image of it: it has no blind control
    for images, color, family in (("rb", "red", ""), ("wg", "blue", ""), ("wg", "blue", "again"), ("rg", "red", "")):
        turns = [{"from": "human", "value": "<image><image>Which colour?"}, {"from": "gpt", "value": color}]
        paths = [f"{name}.png" for letter in images for name in colors if name.startswith(letter)]
        rows.append({**singles[0], "image": paths, "family": family or color, "conversations": turns})
    (folder / "chains.json").write_text(json.dumps(rows))
    built, page = ("--hops", "2", "--limit", "1", "--needles", str(folder / "singles.json")), folder / "chains.html"
    assert haystack.main(words(folder, *built)) == 0
    result = json.loads((folder / "haystack.json").read_text())
    assert result["families"] == [] and result["trained"] is None
    assert [(row["frames"], row["questions"], row["chains"]) for row in result["chains"]] == [(4, 1, 1), (16, 1, 1)]
    assert "not asked" not in capsys.readouterr().out
    given = ("--hops", "given", "--needles", str(folder / "chains.json"), "--html", str(page))
    assert haystack.main(words(folder, *given)) == 0
    result = json.loads((folder / "haystack.json").read_text())
    first, second = result["chains"]
    assert first["questions"] == second["questions"] == 3 and first["chains"] == 2
    correct = {row["family"]: 0 for row in result["chains"]}
    for row in result["answers"]:
        correct[row["family"]] += row["own"] == row["expected"]
    assert [row["accuracy"] for row in (first, second)] == [pytest.approx(100 * n / 3) for n in correct.values()]
    assert set(first["kinds"]) == {"red", "blue", "again"} and 0 <= first["all_correct"] <= 2
    said = capsys.readouterr().out
    assert "all questions correct of" in said and "2 not asked, because no other question" in said
    assert "4 frames, chains" in Page(page.read_text()).cells()
