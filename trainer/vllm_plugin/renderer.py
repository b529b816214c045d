"""Prompts of conversations, for vLLM: its HTTP server and ``LLM.chat`` write them by :class:`FramestreamRenderer`.

    messages -> vLLM fetches addresses -> frames and tiles of training -> tokens of training, with one mark a medium

Control tokens in texts are ordinary characters, and no text makes a mark. A part ``image_url`` or ``video_url`` has an
address, which vLLM fetches within its rules for domains and local files. In ``LLM.chat`` a part may also have pixels:
``{"type": "image", "image": IMAGE}`` or ``{"type": "video", "video": FRAMES, "fps": 2.0}``. The forms are those of
``trainer.serve``: ``start`` and ``end`` beside an address, and ``media_io_kwargs`` for fewer frames.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.multimodal.media.connector import global_thread_pool
from vllm.multimodal.video import VIDEO_LOADER_REGISTRY, VideoLoader
from vllm.renderers.base import BaseRenderer
from vllm.renderers.chat_utils import AsyncMultiModalItemTracker, MultiModalItemTracker
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from framestream.trainer.standalone.media_inputs import ModelMedia
from framestream.trainer.vllm_plugin.chat_encoder import check_pixels, load_encoder
from framestream.trainer.vllm_plugin.processor import MARKS

ADDRESS_PARTS = {"image_url": "image", "video_url": "video"}
#: entries beside an address or beside pixels
MEDIA_ENTRIES = ("start", "end", "fps")
UNDECODED = "framestream"  #: name of :class:`UndecodedVideo` in vLLM
#: how vLLM reads files: all frames of a video that comes as JPEGs
READING = {"video": {"video_backend": UNDECODED, "num_frames": -1}}

Conversation = list[dict[str, Any]]


@VIDEO_LOADER_REGISTRY.register(UNDECODED)
class UndecodedVideo(VideoLoader):
    """Leaves the bytes of a video file to the renderer."""

    @classmethod
    def load_bytes(cls, data: bytes, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        """Return no frames and no metadata."""
        return np.empty((0, 0, 0, 3), dtype=np.uint8), {}


class FramestreamRenderer(BaseRenderer[Any]):
    """Writes the prompts of training."""

    def __init__(self, config: VllmConfig, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._encoder = load_encoder(self.model_config.model, self.model_config.revision)
        self._load_async = make_async(self._encoder.load, executor=global_thread_pool)
        self._write_async = make_async(self._write, executor=self._executor)

    def render_messages(self, messages: Sequence[Any], params: ChatParams) -> tuple[Conversation, TokensPrompt]:
        """Return the conversation as text and its prompt.

        Raises:
            VLLMValidationError: a message or an option has another form, a file cannot be used, or the prompt is too
                long; vLLM's server answers with status 400.
        """
        with _refusals():
            most = _check_options(params)
            tracker = MultiModalItemTracker(self.model_config, media_io_kwargs=READING)
            turns = _read_messages(messages, tracker.create_parser())
            for part in _media_parts(turns, tracker.resolve_items()[0]):
                part.update(self._encoder.load(part, most))
            return self._write(turns, params)

    async def render_messages_async(
        self, messages: Sequence[Any], params: ChatParams
    ) -> tuple[Conversation, TokensPrompt]:
        """Do the same, with all media of a conversation fetched and decoded at once."""
        with _refusals():
            most = _check_options(params)
            tracker = AsyncMultiModalItemTracker(self.model_config, media_io_kwargs=READING)
            turns = _read_messages(messages, tracker.create_parser())
            parts = _media_parts(turns, (await tracker.resolve_items())[0])
            loaded = await asyncio.gather(*(self._load_async(part, most) for part in parts))
            for part, found in zip(parts, loaded, strict=True):
                part.update(found)
            return await self._write_async(turns, params)

    def _write(self, turns: Conversation, params: ChatParams) -> tuple[Conversation, TokensPrompt]:
        row = self._encoder.encode(turns, params.chat_template_kwargs.get("add_generation_prompt", True))
        media: dict[str, list[ModelMedia]] = {}
        ids: list[int] = []
        for entry in row:
            if isinstance(entry, ModelMedia):
                modality = "video" if len(entry.clips) else "image"
                media.setdefault(modality, []).append(entry)
                ids.append(MARKS[modality])
            else:
                ids.append(entry)
        prompt = TokensPrompt(prompt_token_ids=ids, prompt=self._encoder.decode_row(row))
        if media:
            prompt["multi_modal_data"] = media
        return [{"role": turn["role"], "content": _text(turn["content"])} for turn in turns], prompt


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn errors of a request into those that vLLM sends to its client."""
    try:
        yield
    except ValueError as error:
        raise VLLMValidationError(str(error)) from None


def _check_options(params: ChatParams) -> int | None:
    """Check the options of a request; return the most frames of a video, if it says so.

    Raises:
        ValueError: names one that this model does not have.
    """
    asked = {
        "chat_template": params.chat_template,
        "continue_final_message": params.chat_template_kwargs.get("continue_final_message"),
        "tools": params.chat_template_kwargs.get("tools"),
        "mm_processor_kwargs": params.mm_processor_kwargs,
    }
    for name, value in asked.items():
        if value:
            raise ValueError(f"{name}: prompts are those of training, and media are read as in training; leave it out")
    reading = {modality: dict(entries) for modality, entries in (params.media_io_kwargs or {}).items() if entries}
    most = reading.get("video", {}).pop("num_frames", None)
    is_count = isinstance(most, int) and not isinstance(most, bool) and most > 0
    if any(reading.values()) or not (most is None or is_count):
        raise ValueError('media_io_kwargs: takes {"video": {"num_frames": N}} alone, with N from 1')
    return most


def _read_messages(messages: Sequence[Any], parser: Any) -> Conversation:
    """Copy messages in the form of ``FramestreamProcessor``; the parser fetches the media at addresses.

    Raises:
        ValueError: a part has another form.
    """
    turns = []
    for message in messages:
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            content = [_read_part(part, parser) for part in content]
        turns.append({"role": message.get("role"), "content": content})
    return turns


def _read_part(part: Any, parser: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise ValueError(f"a part of a message is {part!r:.60}; it must be a text, or have a type")
    kind = part.get("type")
    if kind in MARKS:
        check_pixels(kind, part.get(kind))
        return {"type": kind, kind: part[kind], **_entries(part, kind, ("type", kind))}
    if kind not in ADDRESS_PARTS:
        return dict(part)  # a text, or refused by the processor
    address = part.get(kind)
    address = dict(address) if isinstance(address, Mapping) else {"url": address}
    url = address.get("url")
    if not isinstance(url, str) or not url:
        raise ValueError(f'a part of type {kind} has no address; pass "{kind}": {{"url": ADDRESS}}')
    _entries(part, kind, ("type", kind, "uuid"), ())
    entries = _entries(address, kind, ("url", "detail"))
    fetch = parser.parse_image if kind == "image_url" else parser.parse_video
    fetch(url)
    return {"type": ADDRESS_PARTS[kind], **entries}


def _entries(
    part: Mapping[str, Any], kind: str, others: Sequence[str], known: Sequence[str] = MEDIA_ENTRIES
) -> dict[str, Any]:
    """Return the known entries of a part; ``others`` are there, too.

    Raises:
        ValueError: names one that is not known.
    """
    for name in part:
        if name not in (*known, *others):
            raise ValueError(f"{name}: in a part of type {kind}: is not known; leave it out")
    return {name: part[name] for name in known if part.get(name) is not None}


def _media_parts(turns: Conversation, fetched: Mapping[str, Sequence[Any]] | None) -> list[dict[str, Any]]:
    """Return the parts of all media in their order, with what was fetched in its place."""
    files: dict[str, Iterator[Any]] = {modality: iter(items) for modality, items in (fetched or {}).items()}
    lists = [turn["content"] for turn in turns if isinstance(turn["content"], list)]
    parts = [part for content in lists for part in content if part.get("type") in MARKS]
    for part in parts:
        if part["type"] not in part:
            part[part["type"]] = next(files[part["type"]])
    return parts


def _text(content: str | list[dict[str, Any]] | None) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content if part.get("type") == "text")
    return content or ""
