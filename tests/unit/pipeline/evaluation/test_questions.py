"""Validation dialogues as prompts, with their own media and with those of another question."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from framestream.pipeline import Questions, load_manifest
from framestream.pipeline.evaluation.questions import Question
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.tokenization.chat_template import load_tokenizer
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from tests.helpers.corpora.small_root import SIZE, Root, colour, manifest, mixed_root, turns


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return mixed_root(tmp_path_factory.mktemp("questions"))


def text(made, ids) -> str:
    """The prompt's text with every run of visual tokens as one mark."""
    ids = [i for i, before in zip(ids, [0, *ids[:-1]], strict=True) if not i == before == IMAGE_TOKEN_INDEX]
    pieces, tokenizer = [[]], load_tokenizer(made.text.tokenizer)
    for i in ids:
        pieces.append([]) if i == IMAGE_TOKEN_INDEX else pieces[-1].append(i)
    return "<image>".join(tokenizer.decode(piece) for piece in pieces)


def test_prompts_end_where_the_answer_begins(root):
    made = manifest(root)
    questions = Questions(made)
    assert len(questions) == 4
    for i in range(4):
        batch = questions.prompt(i)
        vlen = (5, 60)[i % 2]
        assert text(made, batch.input_ids.tolist()) == (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nLook.<|im_end|>\n"
            "<|im_start|>assistant\nI do.<|im_end|>\n<|im_start|>user\n<image>\nThe video lasts for "
            f"{vlen / 2:.2f} seconds, and 8 frames are uniformly sampled from it. \nWhich is it, {i}?<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert questions[i].answer == f"It is {i}." and questions[i].text == f"Which is it, {i}?"
        assert questions[i].family == ("count" if i % 2 else "held out")
        assert questions[i].meta == ({"family": "count"} if i % 2 else {})
        assert (batch.labels == IGNORE_INDEX).all() and batch.clips.shape == (2, 4, SIZE, SIZE, 3)
        assert batch.keys == [questions[i].key] and batch.is_last
        assert len(batch.input_ids) == questions.prompt_length(i)
        assert batch.visual_index.tolist() == list(range(128))


def test_media_are_encoded_while_they_are_decoded(root):
    """The row is the same, with tokens in place of pixels."""
    questions, seen = Questions(manifest(root)), []

    def encode(pixels):
        seen.extend(pixels)
        return torch.zeros(2, 64, 3)

    plain = questions.prompt(0, shuffle=np.random.default_rng(1))
    row = questions.prompt(0, shuffle=np.random.default_rng(1), encode=encode)
    assert torch.equal(torch.cat([clips for clips, _ in seen]), plain.clips)
    assert row.unit_tokens.shape == (2, 64, 3) and plain.unit_tokens is None
    assert len(row.clips) == len(row.image_tiles) == 0
    for name in ("input_ids", "position_ids", "image_positions", "visual_index", "cu_seqlens"):
        assert torch.equal(getattr(row, name), getattr(plain, name))


def test_another_questions_media_come_with_their_own_message(root):
    questions = Questions(manifest(root))
    own, blind = questions.prompt(0), questions.prompt(0, media_of=1)
    assert np.array_equal(blind.clips, questions.prompt(1).clips) and not np.array_equal(own.clips, blind.clips)
    assert "lasts for 30.00 seconds" in text(manifest(root), blind.input_ids.tolist())
    assert "lasts for 2.50 seconds" in text(manifest(root), own.input_ids.tolist())
    assert text(manifest(root), blind.input_ids.tolist()).count("Which is it, 0?") == 1
    assert np.abs(own.clips[0, 0].numpy() - np.array(colour(0, 0))).max() <= 3
    assert len(blind.input_ids) == questions.prompt_length(0, 1)


def test_only_what_precedes_the_answer_is_shown(tmp_path):
    made = Root(tmp_path)
    first, second, image = made.video(8, 8), made.video(9, 9), made.still(150, 60)
    made.dialogue(turns("Hello", "Hi", "<image>\nWhich?", "This.", "<image>\nNo answer."), [first, second], split="val")
    made.dialogue(turns("Only a question"), split="val")
    made.dialogue(turns("<image>\nColours?", "Four."), [image], split="val")
    made.dialogue(turns("Text?", "Yes."), split="val")
    questions = Questions(manifest(made.write()))
    assert [questions[i].answer for i in range(len(questions))] == ["This.", "Four.", "Yes."]
    assert questions.prompt(0).clips.shape[0] == 2
    tiled = questions.prompt(1)
    assert tiled.image_tiles.shape == (3, SIZE, SIZE, 3) and len(tiled.visual_index) == 192
    assert sorted(tiled.visual_index.tolist()) == list(range(192)) != tiled.visual_index.tolist()
    assert questions.prompt(2).clips.shape[0] == questions.prompt(2).image_tiles.shape[0] == 0
    assert np.array_equal(questions.some_images(1, 2), tiled.image_tiles[[0, 2]])
    frames = questions.prompt(0).clips.flatten(0, 1)
    assert np.array_equal(questions.some_images(0, 5), frames[[0, 2, 4, 5, 7]])
    with pytest.raises(ValueError, match="question 1 shows 1 media, question 2 has 0"):
        questions.prompt(1, media_of=2)


def test_a_null_field_of_a_row_is_missing():
    fields = dict.fromkeys(("options", "intervals", "family", "name", "duration"))
    asked = Question.from_turns("key", turns("When?", "At 3 s."), "entry", fields, [])
    assert (asked.options, asked.intervals, asked.family, asked.meta) == ([], None, "entry", {})
    timed = Question.from_turns("key", turns("When?", "then"), "entry", fields | {"intervals": [[1, 2]]}, [])
    assert timed.intervals == [(1.0, 2.0)]  # `options: null` is no options


def test_rejected_samples_of_a_split_are_counted(tmp_path):
    made = Root(tmp_path)
    for _ in range(2):
        made.dialogue(turns("Which?", "a"), split="val", meta={"options": ["a"]})
    with pytest.raises(ShardsError, match=r"\(split: val\); 2 rejected, the first: .*options: "):
        Questions(manifest(made.write()))


def test_a_split_without_questions_is_one_clear_line(tmp_path):
    made = Root(tmp_path)
    made.dialogue(turns("Hello", "Hi"))
    with pytest.raises(
        ShardsError, match=r"no samples with an answer found \(split: val\); add an entry with split: val and rebuild"
    ):
        Questions(manifest(made.write()))


def test_reading_a_manifest_loads_no_framework():
    heavy = "{'torch', 'pyarrow', 'transformers'}"
    code = f"import sys, pipeline; pipeline.load_manifest; print({heavy} & set(sys.modules))"
    assert load_manifest.__module__ == "framestream.pipeline.config.manifest"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
    with pytest.raises(AttributeError, match="nothing_such"):
        __import__("pipeline").nothing_such  # noqa: B018
