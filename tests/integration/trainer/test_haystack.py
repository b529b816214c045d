"""Needles in haystacks through the command line: what is asked, what is counted, what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.haystack import Haystack
from framestream.trainer import haystack
from framestream.trainer.inference.generation import generate
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, load_pretrained, save_weights
from tests.helpers.corpora.needles import DEPTHS, FRAMES, make
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
    frames, depths = ([str(value) for value in values] for values in (FRAMES, DEPTHS))
    asked = ["--manifest", str(folder / "manifest.yaml"), "--checkpoint", str(folder), "--root", str(folder)]
    asked += ["--needles", str(folder / "needles.json"), "--video", str(folder / "0.mp4")]
    return [*asked, "--frames", *frames, "--depths", *depths, "--out", str(folder / "haystack.json"), *more]


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
    assert "4 frames, 100 % deep" in capsys.readouterr().out
    page = Page((folder / "page.html").read_text())
    titles = {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"}
    assert titles == {"accuracy, %", "blind, %"}
    assert sum(tag == "rect" for tag, _ in page.tags) == 2 * len(FRAMES) * len(DEPTHS)


def test_what_the_model_does_not_take_is_left_out_by_name(weights, folder, capsys):
    assert haystack.main(words(folder, *TAKES_300)) == 0
    result = json.loads((folder / "haystack.json").read_text())
    assert {row["frames"] for row in result["families"]} == {4}
    left_out = [line for line in result["unreadable"] if "the limit of the model is 300" in line]
    assert len(left_out) == 2 * len(DEPTHS) and all(", 16 frames, " in line for line in left_out)
    assert "questions left out; the first:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--frames", "6"), 2, "--frames 6"),
        (("--frames", "20000"), 1, "has 32 frames"),
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


@pytest.mark.parametrize("more", [("--depths", "101"), ("--depths", "nan"), ("--frames", "0"), ("--frames", "-4")])
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
    assert "cut.mp4" in more[0] and "gone.mp4" in more[1] and "4 questions left out" in capsys.readouterr().out


def test_more_frames_than_were_trained_are_not_called_trained(weights, folder):
    assert haystack.main(words(folder, "--frames", "16")) == 0
    result = json.loads((folder / "haystack.json").read_text())
    assert result["trained"] is None and result["deepest"] is None
