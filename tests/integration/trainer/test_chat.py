"""``python -m trainer.chat`` through its command line, beside generation from shards."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoTokenizer

from framestream.pipeline import Questions, load_manifest
from framestream.pipeline.config.schema import to_dict
from framestream.trainer import chat
from framestream.trainer.inference.generation import generate
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights.load import initialize, load_pretrained, save_weights
from tests.helpers.corpora import training_corpus as corpus

NEW = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a run that was never trained."""
    path = corpus.make(tmp_path_factory.mktemp("chat"), videos=2)
    manifest = load_manifest(path)
    model = build_model(manifest)
    initialize(model, manifest)
    with torch.no_grad():
        model.language_model.model.embed_tokens.weight.mul_(30)  # or every answer is the same
    folder = Path(manifest.output)
    save_weights(model, folder / "final", manifest)
    (folder / "manifest.yaml").write_text(yaml.safe_dump(to_dict(manifest)))
    return folder


def asked(run: Path, *words: str, given: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainer.chat", "--checkpoint", str(run), "--max-new-tokens", str(NEW), *words]
    return subprocess.run(
        command, env=corpus.environment(), cwd=corpus.PROJECT, capture_output=True, text=True, input=given, timeout=120
    )


def test_a_file_is_answered_about_as_from_shards(run):
    manifest = load_manifest(run / "manifest.yaml")
    questions, model = Questions(manifest), load_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(manifest.text.tokenizer)
    answers = generate(model, [questions.prompt(i) for i in range(2)], NEW, tokenizer.eos_token_id)
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    video = run.parent / "media" / "v0.mp4"
    for i, answer in enumerate(expected):
        done = asked(run, "--video", str(video), "--question", questions[i].text)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{answer}\n"
    assert expected[0]


def test_questions_are_read_line_by_line_and_a_sheet_shows_the_frames(run, tmp_path):
    video, sheet = run.parent / "media" / "v1.mp4", tmp_path / "sheet.png"
    picture = run.parent / "media" / "s1.png"
    words = ("--video", str(video), "--start", "1", "--image", str(picture), "--sheet", str(sheet))
    done = asked(run, *words, given="Which colour is it?\n\nWhat else?\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n\n") and "> " not in done.stdout  # prompts are for terminals
    pixels = np.asarray(Image.open(sheet).convert("RGB"))
    assert pixels.shape == (160 + 14, (4 + 3) * 160, 3)  # 4 frames, and a picture of 2 x 1 tiles with its overview
    assert all(pixels[40:120, 160 * n + 40 : 160 * n + 120].max() < 255 for n in range(4))
    assert np.abs(pixels[60:100, 160 * 4 + 60 : 160 * 4 + 100] - np.array(corpus.COLOURS["green"])).max() < 12


def test_what_does_not_fit_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    (tmp_path / "page.mp4").write_text("<html></html>")
    faults = [
        (("--start", "1", "--question", "?"), 2, "give one"),
        (("--sheet", "a.png", "--question", "?"), 2, "give a --video"),
        (("--top-p", "0", "--question", "?"), 2, "--top-p"),
        (("--video", str(tmp_path / "page.mp4"), "--question", "?"), 1, "page.mp4"),
        (("--video", str(tmp_path / "gone.mp4"), "--question", "?"), 1, "gone.mp4"),
        (("--manifest", str(tmp_path / "gone.yaml"), "--question", "?"), 2, "gone.yaml"),
    ]
    for words, status, text in faults:
        assert chat.main(["--checkpoint", str(run), *words]) == status
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and text in said
    assert chat.main(["--checkpoint", str(tmp_path), "--question", "?"]) == 1
    assert "no weights there" in capsys.readouterr().err
    assert chat.main(["--checkpoint", str(run / "final"), "--question", "Hello?", "--max-new-tokens", "2"]) == 0
