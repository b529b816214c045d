"""An exported model in transformers beside the trainer's: inputs, logits and answers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.memory_index import MediaFile
from framestream.trainer.checkpoint.export import export
from framestream.trainer.inference.generation import generate
from framestream.trainer.model.language_model import PACKED, language_model_attention
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.weights.load import load_pretrained
from tests.helpers.media.footage import BIKES
from tests.helpers.model.rows import INTERNVIDEO2, SMALL
from tests.helpers.model.standalone_exports import chat_prompt, finished_run, load_export, small_manifest

NEW = 8
QUESTIONS = {"film": "What happens?", "picture": "Which colour is it, and why?", "both": "Which?", "text": "Hello?"}


class Exported(NamedTuple):
    folder: Path
    made: Manifest
    ours: VideoLLM
    model: Any
    processor: Any


@pytest.fixture(scope="module", params=["umt", "internvideo2_tied"])
def exported(request, tmp_path_factory) -> Exported:
    folder = tmp_path_factory.mktemp(request.param)
    tied = request.param != "umt"
    made = small_manifest(INTERNVIDEO2 if tied else SMALL, tied=tied)
    export(finished_run(folder / "run", made), folder / "out", shard_bytes=100_000, self_contained=True)
    return Exported(folder / "out", made, load_pretrained(folder / "out"), *load_export(folder / "out"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (140, 300, 3), dtype=np.uint8)).save(path)
    return path


def asked(exported: Exported, picture: Path, name: str) -> tuple[Batch, list[dict]]:
    """A question as a row of the trainer, and as messages for the processor; both show the pixels of the processor."""
    paths = {"film": [BIKES], "picture": [picture], "both": [BIKES, picture], "text": []}[name]
    prompt, _ = chat_prompt(exported.made, QUESTIONS[name], [MediaFile(path) for path in paths])
    kinds = ["image" if path == picture else "video" for path in paths]
    parts = [{"type": kind, kind: str(path)} for kind, path in zip(kinds, paths, strict=True)]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTIONS[name]}]}]
    inputs = exported.processor(messages)
    shown = {"clips": "pixel_values_videos", "image_tiles": "pixel_values"}
    pixels = {ours: inputs[theirs] for ours, theirs in shown.items() if theirs in inputs}
    for ours, found in pixels.items():
        assert found.shape == getattr(prompt, ours).shape
    return dataclasses.replace(prompt, **pixels), messages


def logits_of(model: Any, prompt: Any) -> torch.Tensor:
    return model.language_model.lm_head(model.hidden(prompt))


@pytest.mark.parametrize("name", QUESTIONS)
@torch.no_grad()
def test_inputs_and_logits_are_the_trainers_bit_for_bit(exported, picture, name):
    prompt, messages = asked(exported, picture, name)
    inputs = exported.processor(messages)
    visual = inputs.get("visual_index", torch.full_like(inputs["input_ids"], -1))[0]
    assert visual[visual >= 0].equal(prompt.visual_index)
    assert inputs["input_ids"][0][visual < 0].equal(prompt.input_ids[prompt.input_ids >= 0])
    assert exported.model(**inputs).logits[0].equal(logits_of(exported.ours, prompt))


@torch.no_grad()
def test_greedy_answers_of_a_batch_are_the_chats(exported, picture):
    pairs = [asked(exported, picture, name) for name in QUESTIONS]
    tokenizer, ends = exported.processor.tokenizer, exported.model.generation_config.eos_token_id
    answers = generate(exported.ours, [prompt for prompt, _ in pairs], NEW, ends)
    wanted = [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    assert len(set(wanted)) > 2  # the answers differ between prompts
    inputs = exported.processor([messages for _, messages in pairs])
    start = inputs["input_ids"].shape[1]
    for settings in ({}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}):
        found = exported.model.generate(**inputs, max_new_tokens=NEW, **settings)[:, start:]
        texts = exported.processor.batch_decode(found, skip_special_tokens=True)
        if "num_beams" not in settings:
            assert texts == wanted
            continue
        for row, (_, messages) in enumerate(pairs):
            one = exported.processor(messages)
            alone = exported.model.generate(**one, max_new_tokens=NEW, **settings)[:, one["input_ids"].shape[1] :]
            assert texts[2 * row : 2 * row + 2] == exported.processor.batch_decode(alone, skip_special_tokens=True)


@torch.no_grad()
def test_another_dtype_is_the_trainers_too(exported, picture):
    model, _ = load_export(exported.folder, dtype="bfloat16")
    prompt, messages = asked(exported, picture, "both")
    theirs = load_pretrained(exported.folder).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    found = model(**exported.processor(messages)).logits[0]
    assert found.equal(logits_of(theirs, prompt)) and found.dtype == torch.bfloat16
    placed, _ = load_export(exported.folder, dtype="bfloat16", device_map="auto")
    assert placed(**exported.processor(messages)).logits[0].equal(found)
    cast = load_export(exported.folder)[0].to(torch.bfloat16)  # constants stay as precise as they were
    torch.testing.assert_close(cast(**exported.processor(messages)).logits[0], found, atol=0.5, rtol=0.1)


def test_an_export_leaves_the_trainers_attention_in_its_place(exported):
    """Its copy of attention.py once registered itself under the same name for the whole process."""
    assert ALL_ATTENTION_FUNCTIONS[PACKED] is language_model_attention


@torch.no_grad()
def test_a_saved_copy_loads_again(exported, picture, tmp_path):
    exported.model.save_pretrained(tmp_path / "again")
    exported.processor.save_pretrained(tmp_path / "again")
    model, processor = load_export(tmp_path / "again")
    messages = asked(exported, picture, "both")[1]
    inputs = processor(messages)
    assert inputs["pixel_values_videos"].equal(exported.processor(messages)["pixel_values_videos"])
    assert model(**inputs).logits.equal(exported.model(**inputs).logits)
    assert logits_of(load_pretrained(tmp_path / "again"), asked(exported, picture, "both")[0]).shape[1] == 1024


def test_pixels_get_gradients_to_every_part(exported, picture):
    model, _ = load_export(exported.folder)
    inputs = exported.processor(asked(exported, picture, "both")[1])
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_an_index_without_pixels_is_refused(exported, picture):
    inputs = exported.processor(asked(exported, picture, "film")[1])
    del inputs["pixel_values_videos"]
    with pytest.raises(ValueError, match="visual_index is given without pixels"):
        exported.model(**inputs)
