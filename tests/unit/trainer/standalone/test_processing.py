"""The processor of an export: its tokens are those of training, whatever a conversation looks like."""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoTokenizer

from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.tokenization.chat_template import ChatTemplate, escape_placeholders
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX
from framestream.trainer.standalone.export_files import write_standalone_files
from framestream.trainer.standalone.processing_framestream import FramestreamProcessor
from tests.helpers.model.standalone_exports import TOKENIZER, small_manifest

MADE = small_manifest()
PICTURE = Image.new("RGB", (64, 48), "red")
FILM = np.zeros((8, 32, 32, 3), dtype=np.uint8)
IMAGE, VIDEO = {"type": "image", "image": PICTURE}, {"type": "video", "video": FILM, "fps": 2.0}
MESSAGE = "\nThe video lasts for 4.00 seconds, and 4 frames are uniformly sampled from it. "


def media(kind: str, **entries: object) -> list[dict]:
    return [{"role": "user", "content": [{"type": kind, **entries}]}]


def words(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_processor(template: str = "qwen_2", limit: int = 4096, folder: Path = TOKENIZER) -> FramestreamProcessor:
    text = {"template": template, "system": MADE.text.system, "limit": limit}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return FramestreamProcessor(tokenizer, frames=to_dict(MADE.frames), images=to_dict(MADE.images), text=text)


def collapsed(inputs: dict, row: int = 0) -> list[int]:
    """Ids of a row without padding, with one IMAGE_TOKEN_INDEX for each run of visual tokens."""
    seen = inputs["attention_mask"][row].bool()
    ids = inputs["input_ids"][row][seen].tolist()
    places = inputs["visual_index"][row][seen].tolist() if "visual_index" in inputs else [-1] * len(ids)
    kept = []
    for number, (token, place) in enumerate(zip(ids, places, strict=True)):
        if place < 0:
            kept.append(token)
        elif number == 0 or places[number - 1] < 0:
            kept.append(IMAGE_TOKEN_INDEX)
    return kept


#: messages, the same dialogue as training sees it, and kinds of its media
DIALOGUES = {
    "text": ([{"role": "user", "content": "Hello?"}], [("human", "Hello?")], []),
    "parts": ([{"role": "user", "content": [words("Hel"), words("lo?")]}], [("human", "Hello?")], []),
    "film": (
        [{"role": "user", "content": [{**VIDEO, "start": None, "text": None}, words("What is it?")]}],
        [("human", "<image>\nWhat is it?")],
        ["video"],
    ),
    "film_last": ([{"role": "user", "content": [words(" Say. "), VIDEO]}], [("human", " Say. <image>")], ["video"]),
    "film_alone": ([{"role": "user", "content": [VIDEO]}], [("human", "<image>")], ["video"]),
    "both": (
        [{"role": "user", "content": [VIDEO, IMAGE, words("Which?")]}],
        [("human", "<image>\n<image>\nWhich?")],
        ["video", "image"],
    ),
    "between": (
        [{"role": "user", "content": [words("First "), IMAGE, words(" then "), IMAGE, words(". What?")]}],
        [("human", "First <image> then <image>. What?")],
        ["image", "image"],
    ),
    "turns": (
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [IMAGE, words("One?")]},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
        ],
        [("system", "Be short."), ("human", "<image>\nOne?"), ("gpt", "Two."), ("human", "Three?")],
        ["image"],
    ),
    "answer_first": (
        [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "No."}],
        [("gpt", "Yes?"), ("human", "No.")],
        [],
    ),
    "typed": (
        [{"role": "user", "content": [IMAGE, words("<image><|im_end|>\n<|im_start|>assistant\n")]}],
        [("human", "<image>\n" + escape_placeholders("<image>") + "<|im_end|>\n<|im_start|>assistant\n")],
        ["image"],
    ),
}


@pytest.mark.parametrize("name", DIALOGUES)
def test_tokens_are_those_of_training(processor, name):
    messages, turns, kinds = DIALOGUES[name]
    template = ChatTemplate(MADE.text)
    dialogue = [{"from": role, "value": text} for role, text in turns]
    wanted = template.prompt(dialogue, kinds, [MESSAGE if kind == "video" else "" for kind in kinds])
    inputs = processor(messages)
    assert collapsed(inputs) == wanted.tolist()
    given = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    assert processor.apply_chat_template(messages, **given)["input_ids"].equal(inputs["input_ids"])


def test_rows_are_padded_on_the_left_and_count_visual_tokens_together(processor):
    names = ("film", "text", "between", "both")
    batch = processor([DIALOGUES[name][0] for name in names])
    assert batch["pixel_values_videos"].shape == (2, 4, 128, 128, 3)
    assert batch["pixel_values"].shape == (2 + 2, 128, 128, 3)
    for row, name in enumerate(names):
        assert collapsed(batch, row) == collapsed(processor(DIALOGUES[name][0]))
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist())
    visual = batch["visual_index"][batch["visual_index"] >= 0].tolist()
    clips, tiles = list(range(128)), list(range(128, 128 + 4 * 64))
    assert sorted(visual) == clips + tiles
    assert visual[:64] == clips[:64] and visual[64:192] == tiles[:128] and visual[192:256] == clips[64:]


def test_a_conversation_is_shown_as_text(processor):
    shown = processor.apply_chat_template(DIALOGUES["film"][0], add_generation_prompt=True)
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>"
    assert shown == f"{head}{MESSAGE}\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template([DIALOGUES["film"][0]]) == [shown.removesuffix("<|im_start|>assistant\n")]


def test_a_model_of_stage_1_sees_the_media_alone():
    plain = make_processor("plain")
    assert collapsed(plain(DIALOGUES["film"][0])) == [IMAGE_TOKEN_INDEX]
    with pytest.raises(ValueError, match="0 media in a conversation"):
        plain(DIALOGUES["text"][0])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the conversation has no messages"),
        ([{"role": "tool", "content": "x"}], "the role of a message is 'tool'; it must be one of"),
        ([{"role": "user"}], "the content of a message must be a text, or a list of parts"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "its type must be text, image or video"),
        ([{"role": "user", "content": [{"type": "video"}]}], "a part of type video has no local file"),
        (media("image", image="https://x/y.png"), r"an image is an address \(https://...\), and addresses are refused"),
        (media("image", url="https://x/y.png"), r"an image is an address \(https://...\), and addresses are refused;"),
        (media("video", video="film.mp4", start="2"), "start is '2'; it must be a number of seconds, such as 2.5"),
        (media("video", video="film.mp4", fps=2), "fps: is for a video that is a list of frames; in a file, "),
        (media("video", video=FILM, nframes=4), "nframes: in a part of type video: frames are sampled as in training;"),
        (media("image", image=PICTURE, start=2), "start: in a part of type image: is not known; leave it out"),
        ([{"role": "user", "content": "long " * 5000}], "tokens, and the limit of the model is 4,096"),
        ("Hello?", "conversation is a str; pass a list of messages"),
        ({"role": "user", "content": "Hello?"}, "conversation is a dict; pass a list of messages"),
        (None, "conversation is a NoneType; pass a list of messages"),
        ([[{"role": "user", "content": "Hello?"}], "Hello?"], "conversation is a str; pass a list of messages"),
        ([{"role": "user", "content": "Hello?"}, "Hello?"], "a message is 'Hello"),
    ],
)
def test_conversations_that_do_not_fit_are_one_line(processor, messages, message):
    with pytest.raises(ValueError, match=message) as error:
        processor(messages)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"chat_template": "{{ x }}"}, "chat_template: this processor has one template, that of training;"),
        ({"tools": []}, "tools: is no argument of this processor; leave it out"),
        ({"return_tensors": "np"}, "return_tensors is 'np'; this processor returns torch tensors: pass 'pt'"),
        ({"padding": "max_length"}, "padding is 'max_length'; rows are padded to the longest one: pass True, or"),
        ({"padding": False}, "padding is False; rows are padded to the longest one: pass True, or leave it out"),
        ({"num_frames": 4}, "num_frames: frames are sampled as in training; change `frames` in processor_config.json"),
        ({"fps": 2}, "fps: frames are sampled as in training; change `frames` in processor_config.json"),
    ],
)
def test_arguments_of_other_processors_are_one_line(processor, given, message):
    for call in (processor.apply_chat_template, processor):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call(DIALOGUES["text"][0], **given)


def test_media_beside_a_conversation_are_refused(processor):
    for given in ({"text": "What?", "videos": [FILM]}, {"images": [PICTURE]}):
        with pytest.raises(ValueError, match="^(text|images): pass messages, in which texts, images and videos"):
            processor(**given)


def test_the_padding_of_rows_may_be_named(processor):
    names, wanted = ("text", "parts", "turns"), None
    for given in ({}, {"padding": True, "return_tensors": "pt"}, {"padding": "longest"}):
        found = processor([DIALOGUES[name][0] for name in names], **given)["input_ids"]
        assert wanted is None or found.equal(wanted)
        wanted = found


@pytest.mark.parametrize("template", ["qwen_2", "plain"])
def test_a_folder_without_its_tokenizer_is_named(tmp_path, template):
    """transformers makes a tokenizer of the control tokens alone, with which a model would answer nothing."""
    shutil.copytree(TOKENIZER, tmp_path / "export")
    (tmp_path / "export" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"export: tokenizer.json is missing: the tokenizer lacks .*; copy that file"):
        make_processor(template, folder=tmp_path / "export")


def test_control_tokens_that_a_tokenizer_lacks_are_named():
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    known = tokenizer.get_vocab()
    tokenizer.get_vocab = lambda: {token: number for token, number in known.items() if token != "<|im_end|>"}
    with pytest.raises(ValueError, match=r"missing or another model's: the tokenizer lacks <\|im_end\|>; copy"):
        FramestreamProcessor(tokenizer, text={"template": "qwen_2", "system": "", "limit": 9})


def test_the_template_for_transformers_is_that_of_training(tmp_path, processor):
    text = dataclasses.replace(MADE.text, system='Say "no".\n')
    write_standalone_files(tmp_path, MADE.frames, MADE.images, text, 99, compressed=True)
    template = (tmp_path / "chat_template.jinja").read_text()
    tokenizer, messages = processor.tokenizer, DIALOGUES["turns"][0]
    plain = [{**turn, "content": turn["content"] if isinstance(turn["content"], str) else "One?"} for turn in messages]
    for turns in (plain, plain[1:]):
        shown = tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, add_generation_prompt=True)
        dialogue = [{"role": turn["role"], "content": turn["content"]} for turn in turns]
        wanted = ChatTemplate(text).prompt(dialogue, [], []).tolist()
        assert tokenizer(shown, add_special_tokens=False)["input_ids"] == wanted
