"""Chat messages and model inputs through a Hugging Face processor (Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, ...).

Frames are sampled already, so processors are told not to sample, and are given the second of every frame: video
metadata with a clock of 1,000 ticks a second, in which the number of a "frame" is its millisecond in the clip. So
Qwen3-VL writes true seconds and Qwen2.5-VL computes true ``second_per_grid_ts``, whatever the frame rate of the source.
LLaVA's processors take no times; ``time_message`` says them in the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from framestream.pipeline.adapters.types import Dialogue, Media, Sample
from framestream.pipeline.media.sampling import time_message as message_of
from framestream.pipeline.tokenization.chat_template import MARK, preprocess_multimodal, role_of, text_of

TICKS = 1000  #: of the clock of video metadata, a second


def chats(sample: Sample, time_message: str = "none") -> list[dict[str, Any]]:
    """Each dialogue of a sample as ``{"messages", "videos", "video_metadata", "images"}``.

    ``messages`` is what ``apply_chat_template`` takes: roles system, user and assistant, and contents whose video and
    image entries stand where the marks were; an assistant turn that nothing comes before is left out. ``videos`` are
    uint8 tensors (T, H, W, 3), ``video_metadata`` one mapping a video with the fields of transformers'
    ``VideoMetadata``, ``images`` PIL pictures, each in order of use.

    Args:
        time_message: ``short``, ``long`` or ``none``: the recipe's message about length and times, after each video.

    Raises:
        ValueError: a dialogue has another number of marks than of media.
    """
    videos = [medium for medium in sample.media if medium.kind == "video"]
    return [
        {
            "messages": _messages(dialogue, sample.media, time_message),
            "videos": [medium.frames for medium in videos],
            "video_metadata": [metadata(medium) for medium in videos],
            "images": [Image.fromarray(m.frames[0].numpy()) for m in sample.media if m.kind == "image"],
        }
        for dialogue in sample.dialogues
    ]


def metadata(medium: Media) -> dict[str, Any]:
    """A video's frame times as transformers' ``VideoMetadata`` has them, for frames that are sampled already."""
    ticks = np.rint((medium.timestamps.numpy() - medium.start) * TICKS).astype(np.int64)
    _, height, width, _ = medium.frames.shape
    return {
        "total_num_frames": round(medium.duration * TICKS),
        "fps": float(TICKS),
        "width": width,
        "height": height,
        "duration": medium.duration,
        "frames_indices": ticks.tolist(),
    }


class ChatCollator:
    """Samples to the inputs of one forward pass, a row for each dialogue; a ``collate_fn``.

    Args:
        processor: of transformers, with a chat template.
        time_message: as for :func:`chats`.
        kwargs: for the processor, such as ``padding=True`` (the default) or ``images_kwargs={...}``.
    """

    def __init__(self, processor: Any, time_message: str = "none", **kwargs: Any) -> None:
        self._processor, self._time_message = processor, time_message
        self._kwargs = {"padding": True, "return_tensors": "pt", **kwargs}

    def __call__(self, samples: Sequence[Sample]) -> Any:
        """What the processor returns (``BatchFeature``); a dialogue that ends with a question has a prompt to answer.

        Raises:
            ValueError: there is no dialogue, or the processor refuses them; videos of unequal length do not make a
                batch for LLaVA's.
        """
        rows = [row for sample in samples for row in chats(sample, self._time_message)]
        if not rows:
            raise ValueError("no dialogue among these samples; give samples with dialogues")
        inputs: dict[str, Any] = {"text": [self._text(row["messages"]) for row in rows]}
        kwargs = dict(self._kwargs)
        if images := [row["images"] for row in rows if row["images"]]:
            inputs["images"] = images
        if videos := [video for row in rows for video in row["videos"]]:
            times = [video for row in rows for video in row["video_metadata"]]
            inputs["videos"] = videos
            kwargs["videos_kwargs"] = {
                "video_metadata": times,
                "do_sample_frames": False,
                **kwargs.get("videos_kwargs", {}),
            }
        return self._processor(**inputs, **kwargs)

    def _text(self, messages: list[dict[str, Any]]) -> str:
        asked = messages[-1]["role"] == "user"
        return self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)


def _messages(dialogue: Dialogue, media: Sequence[Media], style: str) -> list[dict[str, Any]]:
    turns = list(dialogue.turns)
    begins = 1 if turns and role_of(turns[0]) == "system" else 0
    if len(turns) > begins and role_of(turns[begins]) == "assistant":
        del turns[begins]
    if not turns:
        raise ValueError(f"{dialogue.key}: the dialogue has no turns")
    if not media:
        return [_message(turn, [text_of(turn)], []) for turn in turns]
    kinds = iter([medium.kind for medium in media])
    messages = []
    for turn in preprocess_multimodal(turns, [_said(medium, style) for medium in media]):
        texts = text_of(turn).split(MARK)
        found = [kind for _, kind in zip(texts[1:], kinds, strict=False)]
        if len(found) < len(texts) - 1:
            raise ValueError(f"{dialogue.key}: more {MARK} marks than media ({len(media)})")
        messages.append(_message(turn, texts, found))
    if next(kinds, None):
        raise ValueError(f"{dialogue.key}: fewer {MARK} marks than media ({len(media)})")
    return messages


def _message(turn: dict, texts: Sequence[str], kinds: Sequence[str]) -> dict[str, Any]:
    """A message whose media stand between its ``texts``; the newline that annotations put after a mark is left out."""
    content = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for kind, text in zip(kinds, texts[1:], strict=True):
        content.append({"type": kind})
        if text := text.removeprefix("\n"):
            content.append({"type": "text", "text": text})
    return {"role": role_of(turn), "content": content}


def _said(medium: Media, style: str) -> str:
    if medium.kind == "image":
        return ""
    seconds = medium.timestamps.numpy() - medium.start
    return message_of(style, medium.duration, seconds * TICKS, TICKS)
