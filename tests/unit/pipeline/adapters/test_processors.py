"""What processors of transformers make of samples: tokens, pixels and times of the frames that were shown."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest
import torch
from PIL import Image

from framestream.pipeline.adapters import ChatCollator, ShardDataset
from framestream.pipeline.adapters.types import Sample
from tests.helpers.model.chat_models import chat_model
from tests.helpers.model.processors import processor

pytestmark = pytest.mark.peers
if not importlib.util.find_spec("torchvision"):
    pytest.skip("torchvision is not installed", allow_module_level=True)

NAMES = ("qwen2_5_vl", "qwen3_vl", "llava_next_video", "llava_onevision", "smolvlm2")


def key(name: str) -> str:
    """What the pixels of videos are called."""
    return "pixel_values" if name == "smolvlm2" else "pixel_values_videos"


def end(name: str) -> str:
    """What ends a turn."""
    return "<end_of_utterance>" if name == "smolvlm2" else "<|im_end|>"


@pytest.fixture(scope="module")
def dataset(footage_root) -> ShardDataset:
    return ShardDataset(footage_root, frames=8)


def levels(made, pixels: torch.Tensor) -> np.ndarray:
    """Normalised pixels (..., 3, H, W) back to levels."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (made.image_mean, made.image_std))
    return ((pixels * std + mean) * 255).numpy()


def processor_images(name: str, made, batch, number: int) -> np.ndarray:
    """The frames (T, H, W, 3) of video ``number`` as the model will see them, in levels."""
    if "grid" not in " ".join(batch):
        return levels(made.video_processor, batch[key(name)][number]).transpose(0, 2, 3, 1)
    grids = batch["video_grid_thw"].tolist()
    first = sum(int(np.prod(grid)) for grid in grids[:number])
    (t, h, w), side = grids[number], made.video_processor.patch_size
    patches = batch["pixel_values_videos"][first : first + t * h * w]
    patches = patches.view(t, h // 2, w // 2, 2, 2, 3, 2, side, side).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    return levels(made.video_processor, patches.reshape(t * 2, 3, h * side, w * side)).transpose(0, 2, 3, 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_sees_the_frames_of_the_sample(dataset, name):
    made = processor(name)
    samples = [dataset[0], dataset[2], dataset[7]]
    batch = ChatCollator(made)(samples)
    assert batch["input_ids"].shape[0] == 3 and batch["attention_mask"].shape == batch["input_ids"].shape
    for number, sample in enumerate(samples[:2]):
        seen = processor_images(name, made, batch, number)
        frames = sample.media[0].frames.numpy()
        assert len(seen) == len(frames) == 8
        size = seen.shape[2:0:-1]
        resized = [np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames]
        assert np.abs(seen - np.stack(resized)).mean() < 3
        assert np.abs(seen[1:] - np.stack(resized)[:-1]).mean() > 6


def spoken(made, ids: torch.Tensor) -> str:
    """A row as text, a run of one visual token as <|video_pad|>*N."""
    text = made.tokenizer.decode(ids).split("<|endoftext|>")[0]
    return re.sub(r"((<\|?(?:video|image)(?:_pad\|)?>)\2*)", lambda run: f"{run[2]}*{len(run[1]) // len(run[2])}", text)


def test_qwen2_5_is_given_the_seconds_of_its_grid(dataset):
    made = processor("qwen2_5_vl")
    batch = ChatCollator(made)([dataset[0], dataset[2]])
    assert batch["second_per_grid_ts"].tolist() == pytest.approx([2 * 10 / 8, 2 * 5.5 / 8])  # 2 frames a grid step
    tokens = int(batch["video_grid_thw"][0].prod()) // 4
    assert spoken(made, batch["input_ids"][0]) == (
        f"<|im_start|>user\n<|vision_start|><|video_pad|>*{tokens}<|vision_end|>What is seen?<|im_end|>\n"
        "<|im_start|>assistant\nBicycles.<|im_end|>\n"
    )


@pytest.mark.parametrize("row", [0, 2])
def test_qwen3_says_the_true_seconds(dataset, row):
    made = processor("qwen3_vl")
    batch = ChatCollator(made)([dataset[row]])
    said = [float(second) for second in re.findall(r"<(\d+\.\d) seconds>", spoken(made, batch["input_ids"][0]))]
    (item,) = dataset[row].media
    pairs = (item.timestamps.numpy() - item.start).reshape(4, 2).mean(axis=1)
    assert np.abs(pairs - said).max() <= 0.0501 and len(set(said)) == 4


@pytest.mark.parametrize("name", ["llava_next_video", "llava_onevision"])
def test_llava_is_told_the_times_in_words(dataset, name):
    made = processor(name)
    batch = ChatCollator(made, time_message="long")([dataset[2]])
    item = dataset[2].media[0]
    seconds = ", ".join(f"{second:.1f}" for second in np.around((item.timestamps - 2).numpy(), 1))
    assert f"sampled at {seconds} seconds. \nAnd here?" in spoken(made, batch["input_ids"][0])


@pytest.mark.parametrize("name", NAMES)
def test_stills_several_stills_text_and_video_share_a_batch(dataset, name):
    made = processor(name)
    alone = [ChatCollator(made)([dataset[row]]) for row in (0, 5, 6, 7)]
    batch = ChatCollator(made)([dataset[row] for row in (0, 5, 6, 7)])
    for one, ids, mask in zip(alone, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[mask.bool()].tolist() == one["input_ids"][0].tolist()
    pixels = batch["pixel_values"]
    if name == "smolvlm2":  # a row for each chat
        for one, row, mask in zip(alone[:3], pixels, batch["pixel_attention_mask"], strict=False):
            assert torch.equal(one["pixel_values"][0], row[: one["pixel_values"].shape[1]])
            assert torch.equal(one["pixel_attention_mask"][0], mask[: one["pixel_values"].shape[1]])
        assert not pixels[0, 8:].any() and not pixels[1, 5:].any() and not pixels[3].any()
    else:
        assert len(pixels) == sum(len(one.get("pixel_values", [])) for one in alone)
        assert torch.equal(batch["pixel_values_videos"], alone[0]["pixel_values_videos"])


def test_smolvlm2_sees_a_mixed_batch_as_each_row_alone(dataset):
    """One row has an image, a video and an image, whose pixels its processor would drop."""
    made, model = processor("smolvlm2"), chat_model("smolvlm2").eval()
    media = [dataset[6].media[0], dataset[0].media[0], dataset[6].media[1]]
    turns = [{"from": "human", "value": "<image>, <image> or <image>?"}, {"from": "gpt", "value": "This."}]
    both = Sample(media, [dataset[0].dialogues[0]._replace(turns=turns)])
    with torch.no_grad():
        for samples in ([dataset[5], dataset[7]], [dataset[7], dataset[0]], [dataset[5], both, dataset[7], dataset[2]]):
            batch = ChatCollator(made, labels=True)(samples)
            logits = model(**batch).logits
            for row, sample in enumerate(samples):
                alone = ChatCollator(made, labels=True)([sample])
                length = alone["input_ids"].shape[1]
                assert torch.allclose(logits[row, :length], model(**alone).logits[0], atol=1e-4)
    assert learned(made, batch)[1] == "This.<end_of_utterance>"
    wanted = torch.cat([ChatCollator(made)([s])["pixel_values"][0] for s in (dataset[6], dataset[0])])
    assert torch.equal(batch["pixel_values"][1], torch.cat([wanted[:5], wanted[10:], wanted[5:10]]))


def test_smolvlm2_is_given_the_seconds_and_one_length(dataset, footage_root):
    made = processor("smolvlm2")
    text = spoken(made, ChatCollator(made)([dataset[2]])["input_ids"][0])
    assert "series of eight frames from a 0:00:05 [H:MM:SS] video" in text
    said = [60 * int(minute) + int(second) for minute, second in re.findall(r"Frame from (\d\d):(\d\d):", text)]
    (item,) = dataset[2].media
    assert said == (item.timestamps - item.start).floor().int().tolist()
    fewer = ShardDataset(footage_root, frames=4)[0]
    with pytest.raises(ValueError, match="4 to 8 frames in one batch"):
        ChatCollator(made)([dataset[2], fewer])


@pytest.mark.parametrize("name", NAMES)
def test_a_dialogue_that_ends_with_a_question_is_a_prompt(dataset, name):
    made, sample = processor(name), dataset[0]
    asked = sample._replace(dialogues=[sample.dialogues[0]._replace(turns=sample.dialogues[0].turns[:1])])
    assert spoken(made, ChatCollator(made)([asked])["input_ids"][0]).endswith(
        "Assistant:" if name == "smolvlm2" else "<|im_start|>assistant\n"
    )


def learned(made, batch) -> list[str]:
    """The labels of each row as text."""
    labels = batch["labels"]
    assert labels.shape == batch["input_ids"].shape and ((labels == batch["input_ids"]) | (labels == -100)).all()
    return [made.tokenizer.decode(row[row != -100]) for row in labels]


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_the_answers(dataset, name):
    made, rows = processor(name), (0, 3, 4, 5, 6, 7)  # videos, one image, two images, text; one and two answers
    samples = [dataset[row] for row in rows]
    batch = ChatCollator(made, labels=True)(samples)
    answers = [[turn["value"] for turn in s.dialogues[0].turns if turn["from"] == "gpt"] for s in samples]
    assert learned(made, batch) == ["".join(f"{answer}{end(name)}" for answer in some) for some in answers]
    assert "offset_mapping" not in batch and "text_replacement_offsets" not in batch


@pytest.mark.parametrize("name", NAMES)
def test_dialogues_about_one_video_share_its_tokens(footage_root, name):
    made, media = processor(name), ShardDataset(footage_root, by="media", frames=8)
    (sample,) = [sample for sample in media if len(sample.dialogues) == 2 and "Bicycles." in str(sample.dialogues)]
    batch = ChatCollator(made, labels=True, joined=True)([sample])
    assert learned(made, batch) == [f"Bicycles.{end(name)}Some people.{end(name)}"]
    alone = ChatCollator(made)([sample._replace(dialogues=sample.dialogues[:1])])
    assert torch.equal(batch[key(name)], alone[key(name)])
    first = alone["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist()[: len(first)] == first


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_would_lose_an_answer_is_refused(footage_root, name):
    made, media = processor(name), ShardDataset(footage_root, by="media", frames=8)
    (sample,) = [sample for sample in media if len(sample.dialogues) == 2 and "Bicycles." in str(sample.dialogues)]
    whole = ChatCollator(made, labels=True, joined=True)([sample])["input_ids"].shape[1]
    cut = {"labels": True, "joined": True, "truncation": True}
    for length in (whole - 3, whole - 30):  # within the last answer, and before it
        with pytest.raises(ValueError, match=rf"row 0 .*{length} tokens and loses answers; raise max_length"):
            ChatCollator(made, **cut, max_length=length)([sample])
    assert learned(made, ChatCollator(made, **cut, max_length=whole)([sample]))[0].endswith(f"people.{end(name)}")


def test_settings_reach_the_processor(dataset):
    made = processor("llava_onevision")
    batch = ChatCollator(made, videos_kwargs={"size": {"height": 28, "width": 28}})([dataset[0]])
    assert batch["pixel_values_videos"].shape[-2:] == (28, 28)
