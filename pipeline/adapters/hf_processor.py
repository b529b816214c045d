"""Chat messages and model inputs through a Hugging Face processor (Qwen2.5-VL, SmolVLM2, LLaVA-OneVision, ...).

The frames are already sampled, so the processor must not sample again. It receives the time of every frame as video
metadata at 1,000 "frames" a second, in which the number of a frame is its millisecond in the clip. So Qwen3-VL writes
true seconds, SmolVLM2 their minutes and seconds, and Qwen2.5-VL computes a true ``second_per_grid_ts``, whatever the
frame rate of the source. LLaVA's processors accept no times; ``time_message`` states them in the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import numpy as np
from PIL import Image

from framestream.pipeline.adapters.answer_labels import answer_spans, with_labels
from framestream.pipeline.adapters.shared_pixels import check_lengths, merge_pixels, shares_pixels
from framestream.pipeline.adapters.types import Dialogue, Media, Sample, StreamBatch
from framestream.pipeline.media.sampling import time_message as make_time_message
from framestream.pipeline.tokenization.chat_template import (
    IMAGE_PLACEHOLDER,
    preprocess_multimodal,
    turn_role,
    turn_text,
)
from framestream.pipeline.utils.arguments import check_argument_names, refuse_unknown_arguments

TICKS = 1000  #: ticks a second of the clock in video metadata


@refuse_unknown_arguments
def chats(sample: Sample, time_message: str = "none", joined: bool = False) -> list[dict[str, Any]]:
    """Convert each dialogue of a sample to ``{"messages", "videos", "video_metadata", "images"}``.

    ``messages`` is the argument of ``apply_chat_template``: roles system, user and assistant, and contents with video
    and image entries in place of the marks. An assistant turn at the beginning is left out. ``videos`` are tensors,
    uint8 (T, H, W, 3). ``video_metadata`` has one mapping per video with the fields of transformers'
    ``VideoMetadata``. ``images`` are PIL images. Each list is in order of use.

    Args:
        sample: a dialogue with its media, or a media item with its dialogues.
        time_message: ``short``, ``long`` or ``none``: the recipe's message about length and times, after each video.
        joined: let the dialogues about one media item follow each other in one chat, in their order, so that it is
            encoded once. The marks and time messages of all but the first are left out. A dialogue with another system
            turn, or after one that ends with a question, begins another chat, which later ones may join.

    Raises:
        ValueError: a dialogue's number of marks is not its number of media, such as of one whose media are missing.
    """
    videos = [media for media in sample.media if media.kind == "video"]
    return [
        {
            "messages": messages,
            "videos": [media.frames for media in videos],
            "video_metadata": [video_metadata(media) for media in videos],
            "images": [Image.fromarray(media.frames[0].numpy()) for media in sample.media if media.kind == "image"],
        }
        for messages in _chats(sample, time_message, joined)
    ]


def _chats(sample: Sample, time_message: str, joined: bool) -> list[list[dict[str, Any]]]:
    """Return the messages of each chat of a sample."""
    made: list[list[dict[str, Any]]] = []
    for dialogue in sample.dialogues:
        messages = _messages(dialogue, sample.media, time_message)
        earlier = [chat for chat in made if joined and _system(chat) == _system(messages)]
        if earlier and earlier[-1][-1]["role"] == "assistant":
            untimed = _messages(dialogue, sample.media, "none")
            earlier[-1] += [_without_media(message) for message in untimed if message["role"] != "system"]
        else:
            made.append(messages)
    return made


def _system(messages: Sequence[dict[str, Any]]) -> Any:
    return messages[0]["content"] if messages[0]["role"] == "system" else None


def _without_media(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": _filled([part for part in message["content"] if part["type"] == "text"])}


def _filled(content: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return content that has a part, because some templates look at the first one."""
    return content or [{"type": "text", "text": ""}]


def video_metadata(video: Media) -> dict[str, Any]:
    """Return the fields of transformers' ``VideoMetadata`` for a video whose frames are already sampled."""
    ticks = np.rint((video.timestamps.numpy() - video.start) * TICKS).astype(np.int64)
    _, height, width, _ = video.frames.shape
    return {
        "total_num_frames": round(video.duration * TICKS),
        "fps": float(TICKS),
        "width": width,
        "height": height,
        "duration": video.duration,
        "frames_indices": ticks.tolist(),
    }


class ChatCollator:
    """A ``collate_fn`` that converts samples to the inputs of one forward pass, with one row for each chat.

    Args:
        processor: of transformers, with a chat template.
        time_message: as for :func:`chats`.
        labels: add ``labels``, int64 (rows, tokens): the ids of the answers, the end of each included, and -100
            elsewhere.
        joined: as for :func:`chats`.
        kwargs: arguments of the processor, such as ``padding=True`` (the default) or ``images_kwargs={...}``.

    Raises:
        TypeError: the processor has no such argument.
    """

    def __init__(
        self, processor: Any, time_message: str = "none", labels: bool = False, joined: bool = False, **kwargs: Any
    ) -> None:
        if names := _argument_names(processor):
            check_argument_names("ChatCollator", kwargs, ["time_message", "labels", "joined", *names])
        self._processor, self._time_message, self._labels, self._joined = processor, time_message, labels, joined
        self._shared = shares_pixels(processor)
        self._kwargs = {"padding": True, "return_tensors": "pt", **kwargs}

    def __call__(self, samples: Sequence[Sample | StreamBatch | Mapping[str, Sample]]) -> Any:
        """Return the processor's ``BatchFeature``. A chat that ends with a question gets a generation prompt.

        Batches of a :class:`framestream.pipeline.adapters.ShardStream` are joined to one. Rows of
        :func:`framestream.pipeline.adapters.as_hf_dataset` are taken as well.

        Raises:
            ValueError: there is no dialogue, or the processor refuses them. The processors of LLaVA and SmolVLM2 take
                videos of one length in a batch.
        """
        rows = [row for sample in _samples(samples) for row in chats(sample, self._time_message, self._joined)]
        if not rows:
            raise ValueError("no dialogue among these samples; pass samples with dialogues")
        texts = [self._text(row["messages"]) for row in rows]
        offsets = {"return_offsets_mapping": True, "return_text_replacement_offsets": True} if self._labels else {}
        features = self._process(texts, rows, **offsets)
        if self._shared and (any(row["images"] for row in rows) and any(row["videos"] for row in rows)):
            alone = [{"images": [image], "videos": []} for row in rows for image in row["images"]]
            images = self._process([self._processor.image_token] * len(alone), alone)
            features.update(merge_pixels(images, features, [_kinds(row["messages"]) for row in rows]))
        if not self._labels:
            return features
        spans = [answer_spans(row["messages"], text, self._render) for row, text in zip(rows, texts, strict=True)]
        return with_labels(features, spans)

    def _process(self, texts: Sequence[str], rows: Sequence[Mapping[str, Any]], **kwargs: Any) -> Any:
        """Return the processor's features of texts with the media of ``rows``."""
        inputs: dict[str, Any] = {"text": list(texts)}  # a processor may write into it
        kwargs = {**self._kwargs, **kwargs}
        if images := [row["images"] for row in rows if row["images"]]:
            inputs["images"] = [row["images"] for row in rows] if self._shared else images
        if videos := [video for row in rows for video in row["videos"]]:
            if self._shared:
                check_lengths(videos)
            metadata = [video for row in rows for video in row["video_metadata"]]
            inputs["videos"] = videos
            kwargs["videos_kwargs"] = {
                "video_metadata": metadata,
                "do_sample_frames": False,
                **kwargs.get("videos_kwargs", {}),
            }
        return self._processor(**inputs, **kwargs)

    def _text(self, messages: list[dict[str, Any]]) -> str:
        return self._render(messages, messages[-1]["role"] == "user")

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        return self._processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)


def _kinds(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return ``image`` or ``video`` for each mark."""
    return [part["type"] for message in messages for part in message["content"] if part["type"] != "text"]


def _samples(items: Sequence[Sample | StreamBatch | Mapping[str, Sample]]) -> Iterator[Sample]:
    """Yield the samples of batches of a stream, of rows of a data set of Hugging Face, and samples themselves."""
    for item in items:
        if isinstance(item, StreamBatch):
            yield from item.samples
        elif isinstance(item, Mapping):
            yield item["sample"]
        else:
            yield item


def _argument_names(processor: Any) -> list[str]:
    """Return the arguments that a processor of transformers says it takes, none if it does not say."""
    if not hasattr(processor, "valid_processor_kwargs"):
        return []
    groups = get_type_hints(processor.valid_processor_kwargs)
    parts = [getattr(processor, name, None) for name in ("image_processor", "video_processor")]
    owners = [*groups.values(), *(getattr(part, "valid_kwargs", None) for part in parts)]
    return [*groups, *(name for owner in owners for name in getattr(owner, "__annotations__", {}))]


def _messages(dialogue: Dialogue, media: Sequence[Media], style: str) -> list[dict[str, Any]]:
    turns = list(dialogue.turns)
    first = 1 if turns and turn_role(turns[0]) == "system" else 0
    if len(turns) > first and turn_role(turns[first]) == "assistant":
        del turns[first]
    if not turns:
        raise ValueError(f"{dialogue.key}: the dialogue has no turns")
    if not media and not any(IMAGE_PLACEHOLDER in turn_text(turn) for turn in turns):
        return [_message(turn, [turn_text(turn)], []) for turn in turns]
    kinds = iter([item.kind for item in media])
    messages = []
    for turn in preprocess_multimodal(turns, [_time_message(item, style) for item in media]):
        texts = turn_text(turn).split(IMAGE_PLACEHOLDER)
        found = [kind for _, kind in zip(texts[1:], kinds, strict=False)]
        if len(found) < len(texts) - 1:
            fix = "pass samples that have them, of ShardDataset, ShardStream or stream_members"
            raise ValueError(f"{dialogue.key}: more {IMAGE_PLACEHOLDER} marks than media ({len(media)}); {fix}")
        messages.append(_message(turn, texts, found))
    if next(kinds, None):
        raise ValueError(f"{dialogue.key}: fewer {IMAGE_PLACEHOLDER} marks than media ({len(media)})")
    return messages


def _message(turn: dict, texts: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """Return a message with its media between its ``texts``, without the newline that annotations put after a mark."""
    content = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for kind, text in zip(kinds, texts[1:], strict=True):
        content.append({"type": kind})
        if text := text.removeprefix("\n"):
            content.append({"type": "text", "text": text})
    return {"role": turn_role(turn), "content": _filled(content)}


def _time_message(media: Media, style: str) -> str:
    if media.kind == "image":
        return ""
    seconds = media.timestamps.numpy() - media.start
    return make_time_message(style, media.duration, seconds * TICKS, TICKS)
