"""The processor of an exported model, for ``AutoProcessor.from_pretrained(FOLDER, trust_remote_code=True)``.

    messages = [{"role": "user", "content": [{"type": "video", "video": "film.mp4"},
                                             {"type": "text", "text": "What happens?"}]}]
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)

The content of a message is a text, or a list of parts of ``type`` ``text``, ``image`` or ``video``. An image is a path,
an image or an array. A video is a path, with ``start`` and ``end`` in seconds if a clip of it is meant, or a sequence
of frames, with ``fps``, the frames of a second.
Frames, tiles, time messages and tokens are those of training. Control tokens in texts are ordinary characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig
from framestream.trainer.standalone.media_inputs import ModelMedia, load_image, load_video

MARK = "<image>"  #: shows a media item in a conversation that is not tokenized
ROLES = ("system", "user", "assistant")
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"  #: control tokens of the template ``qwen_2``
#: entries of a part of media, beside ``type`` and that with the type's name; ``path`` or ``url`` may be in its place
MEDIA_ENTRIES = {"image": ("path", "url"), "video": ("path", "url", "start", "end", "fps")}
#: arguments and entries of other processors -> what to do here
OTHER_WAYS = {
    **dict.fromkeys(("text", "images", "videos"), "pass messages, in which texts, images and videos are parts"),
    **dict.fromkeys(
        ("num_frames", "nframes", "min_frames", "max_frames", "do_sample_frames", "video_fps", "fps"),
        "frames are sampled as in training; change `frames` in processor_config.json",
    ),
    **dict.fromkeys(
        ("size", "do_resize", "min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width"),
        "media are resized as in training; leave it out",
    ),
    "chat_template": "this processor has one template, that of training; leave it out",
}

Part = str | ModelMedia


class FramestreamProcessor(ProcessorMixin):
    """Turns conversations about videos and images into the model's inputs.

    Args:
        tokenizer: of the export.
        frames: how frames are sampled and resized.
        images: how images are divided into tiles.
        text: ``template`` (``qwen_2`` or ``plain``), ``system`` (the default system turn), and ``limit``, the tokens
            that the model takes.
        chat_template: for transformers' own methods; this class does not use it.
    """

    attributes = ["tokenizer"]
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: Any = None,
        frames: dict | None = None,
        images: dict | None = None,
        text: dict | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.frames, self.images, self.text = dict(frames or {}), dict(images or {}), dict(text or {})
        if tokenizer is not None and self.text:
            self._check_tokenizer()

    def __call__(
        self,
        conversation: Any = None,
        add_generation_prompt: bool = True,
        padding: bool | str = True,
        return_tensors: str = "pt",
        **others: Any,
    ) -> BatchFeature:
        """Encode a conversation, or a list of conversations, which are padded on the left.

        Args:
            conversation: messages ``{"role", "content"}``, or a list of such lists.
            add_generation_prompt: end each with the beginning of the answer.
            padding: True or ``longest``: rows are as long as the longest one.
            return_tensors: ``pt``.
            others: arguments of other processors, which are refused with what to do instead.

        Returns:
            ``input_ids``, ``attention_mask`` and, with media, ``visual_index`` int64 (B, L), ``pixel_values`` (tiles)
            and ``pixel_values_videos`` (clips) uint8

        Raises:
            ValueError: an argument or a message has another form, or the conversation is too long.
            MediaError: a file cannot be used; one line that names it.
        """
        _check_options(padding, return_tensors, others)
        conversations = _as_batch(conversation)
        rows = [self._encode(messages, add_generation_prompt) for messages in conversations]
        return BatchFeature(_collate(rows, self.tokenizer.pad_token_id or 0))

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = True,
        return_tensors: str = "pt",
        padding: bool | str = True,
        **others: Any,
    ) -> Any:
        """Return the inputs of the model, or without ``tokenize`` the text, in which ``<image>`` stands for media.

        Raises:
            ValueError: another template is requested; else as of :meth:`__call__`.
        """
        if chat_template is not None:
            others = {**others, "chat_template": chat_template}
        _check_options(padding, return_tensors, others)
        if tokenize:
            inputs = self(conversation, add_generation_prompt)
            return inputs if return_dict else inputs["input_ids"]
        texts = [self._render(messages, add_generation_prompt) for messages in _as_batch(conversation)]
        return texts if _is_batch(conversation) else texts[0]

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "visual_index", "pixel_values", "pixel_values_videos"]

    def _check_tokenizer(self) -> None:
        """Check that the tokenizer is whole: transformers makes one of what files there are.

        Raises:
            ValueError: it has no vocabulary, or lacks a control token; names the file that is missing.
        """
        known = self.tokenizer.get_vocab()
        controls = (TURN_START, TURN_END) if self.text["template"] == "qwen_2" else ()
        lost = [token for token in controls if token not in known] or ["a vocabulary"] * (not self._ids("user\n"))
        if lost:
            name = self.tokenizer.name_or_path
            is_known = bool(name) and Path(name).is_dir() and not (Path(name) / "tokenizer.json").is_file()
            fault = "tokenizer.json is missing" if is_known else "tokenizer.json is missing or another model's"
            fix = "copy that file from the export, or export the model again"
            raise ValueError(f"{name}: {fault}: the tokenizer lacks {', '.join(lost)}; {fix}")

    def _encode(self, messages: Sequence[dict], add_generation_prompt: bool) -> list[int | ModelMedia]:
        """Encode one conversation; each media item is one entry."""
        turns = self._load(messages)
        if self.text["template"] == "plain":
            media = [part for _, parts in turns for part in parts if isinstance(part, ModelMedia)]
            if len(media) != 1:
                raise ValueError(f"{len(media)} media in a conversation; a model of template plain describes one")
            return [media[0]]
        start, end = self._control(TURN_START), self._control(TURN_END)
        row: list[int | ModelMedia] = []
        for role, parts in turns:
            row.append(start)
            for part in [f"{role}\n", *parts] if not isinstance(parts[0], str) else [f"{role}\n{parts[0]}", *parts[1:]]:
                row += self._ids(part) if isinstance(part, str) else [part]
            row += [end, *self._ids("\n")]
        if add_generation_prompt:
            row += [start, *self._ids("assistant\n")]
        count = sum(len(part.order) if isinstance(part, ModelMedia) else 1 for part in row)
        if count >= self.text["limit"]:
            raise ValueError(f"the prompt has {count:,} tokens, and the limit of the model is {self.text['limit']:,}")
        return row

    def _load(self, messages: Sequence[dict]) -> list[tuple[str, list[Part]]]:
        """Return the turns of a conversation, with the media in them decoded, and texts as in training."""
        for message in messages:
            if not isinstance(message, Mapping):
                raise ValueError(f'a message is {message!r:.40}; pass {{"role": ..., "content": ...}}')
        contents = [(_role(message), _parts(message)) for message in messages]
        if not contents:
            raise ValueError("the conversation has no messages")
        if contents[0][0] != "system":
            contents.insert(0, ("system", [self.text["system"]]))
        if len(contents) > 1 and contents[1][0] == "assistant":  # as in training
            del contents[1]
        images = sum(not isinstance(part, str) and part["type"] == "image" for _, parts in contents for part in parts)
        return [(role, self._turn(parts, images > 1)) for role, parts in contents]

    def _turn(self, parts: list[str | dict], several: bool) -> list[Part]:
        """Lay out one turn: media at its beginning, each on a line of its own, and the time message after a video."""
        media = [part for part in parts if not isinstance(part, str)]
        if len(media) == 1 and parts[0] is not media[0]:  # as published: a single item comes first
            parts = [media[0], "".join(part for part in parts if isinstance(part, str)).strip()]
        turn: list[Part] = []
        leading = True
        for number, part in enumerate(parts):
            if isinstance(part, str):
                leading = False
                _append(turn, part)
                continue
            loaded = self._media(part, several)
            turn.append(loaded)
            _append(turn, f"{loaded.message.rstrip()} " if loaded.message else "")
            if leading and any(parts[number + 1 :]):
                _append(turn, "\n")
        return turn or [""]

    def _media(self, part: dict, several: bool) -> ModelMedia:
        kind = part["type"]
        part = {name: value for name, value in part.items() if value is not None}
        for name in part:
            if name not in ("type", kind, *MEDIA_ENTRIES[kind]):
                fix = OTHER_WAYS.get(name, "is not known; leave it out")
                raise ValueError(f"{name}: in a part of type {kind}: {fix}")
        value = next((part[name] for name in (kind, "path", "url") if name in part), None)
        if value is None:
            raise ValueError(f"a part of type {kind} has no local file or pixels under {kind!r}")
        if kind == "video":
            if "fps" in part and isinstance(value, (str, Path)):
                raise ValueError(f"fps: is for a video that is a list of frames; in a file, {OTHER_WAYS['fps']}")
            bounds = part.get("start"), part.get("end")
            return load_video(value, FramesConfig(**self.frames), part.get("fps", 1.0), *bounds)
        return load_image(value, ImagesConfig(**self.images), self.frames["size"], several)

    def _render(self, messages: Sequence[dict], add_generation_prompt: bool) -> str:
        turns = self._load(messages)
        if self.text["template"] == "plain":
            return MARK
        texts = [
            f"{TURN_START}{role}\n{''.join(part if isinstance(part, str) else MARK for part in parts)}{TURN_END}\n"
            for role, parts in turns
        ]
        return "".join(texts) + (f"{TURN_START}assistant\n" if add_generation_prompt else "")

    def _control(self, token: str) -> int:
        return self.tokenizer.convert_tokens_to_ids(token)

    def _ids(self, text: str) -> list[int]:
        """Encode a text, in which control tokens are ordinary characters."""
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _check_options(padding: bool | str, return_tensors: str, others: dict[str, Any]) -> None:
    """Check the arguments that other processors have, too.

    Raises:
        ValueError: names one that does not fit, and what to do.
    """
    if padding not in (True, "longest"):
        raise ValueError(f"padding is {padding!r:.40}; rows are padded to the longest one: pass True, or leave it out")
    if return_tensors not in ("pt", "auto"):
        raise ValueError(f"return_tensors is {return_tensors!r:.40}; this processor returns torch tensors: pass 'pt'")
    for name in others:
        raise ValueError(f"{name}: {OTHER_WAYS.get(name, 'is no argument of this processor; leave it out')}")


def _is_batch(conversation: Any) -> bool:
    return bool(conversation) and not isinstance(conversation[0], Mapping)


def _as_batch(conversation: Any) -> Sequence[Sequence[dict]]:
    """Return a list of conversations.

    Raises:
        ValueError: it is no list of messages, or a list of such lists.
    """
    is_list = isinstance(conversation, (list, tuple))
    batch = conversation if is_list and _is_batch(conversation) else [conversation]
    for one in batch:
        if not isinstance(one, (list, tuple)):
            wanted = 'a list of messages {"role": ..., "content": ...}, or a list of such lists'
            raise ValueError(f"conversation is a {type(one).__name__}; pass {wanted}")
    return batch


def _role(message: dict) -> str:
    if message.get("role") not in ROLES:
        raise ValueError(f"the role of a message is {message.get('role')!r:.40}; it must be one of {', '.join(ROLES)}")
    return message["role"]


def _parts(message: dict) -> list[str | dict]:
    """Return the content of a message as texts and parts of media."""
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError("the content of a message must be a text, or a list of parts")
    parts: list[str | dict] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts += [part["text"]] if part["text"] else []
        elif kind in ("image", "video"):
            parts.append(part)
        else:
            raise ValueError(f"a part of a message is {part!r:.60}; its type must be text, image or video")
    return parts


def _append(turn: list[Part], text: str) -> None:
    """Add text to a turn; texts beside each other become one, as they are tokenized in training."""
    if turn and isinstance(turn[-1], str):
        turn[-1] += text
    elif text:
        turn.append(text)


def _collate(rows: list[list[int | ModelMedia]], padding: int) -> dict[str, torch.Tensor]:
    """Pad rows on the left, with ids, and visual tokens by their place among those of all clips, then of all tiles."""
    media = [part for row in rows for part in row if isinstance(part, ModelMedia)]
    clips = [part.clips for part in media if len(part.clips)]
    tiles = [part.tiles for part in media if len(part.tiles)]
    clip, tile = 0, TOKENS_PER_CLIP * sum(map(len, clips))  # the next free place of each
    ids: list[np.ndarray] = []
    places: list[np.ndarray] = []
    for row in rows:
        row_ids: list[int] = []
        row_places: list[int] = []
        for part in row:
            if not isinstance(part, ModelMedia):
                row_ids.append(part)
                row_places.append(-1)
                continue
            row_ids += [padding] * len(part.order)
            row_places += (part.order + (clip if len(part.clips) else tile)).tolist()
            clip, tile = clip + TOKENS_PER_CLIP * len(part.clips), tile + TOKENS_PER_TILE * len(part.tiles)
        ids.append(np.array(row_ids, dtype=np.int64))
        places.append(np.array(row_places, dtype=np.int64))
    longest = max(map(len, ids))
    seen = [np.ones(len(row), dtype=np.int64) for row in ids]
    inputs = {"input_ids": _pad(ids, longest, padding), "attention_mask": _pad(seen, longest, 0)}
    if media:
        inputs["visual_index"] = _pad(places, longest, -1)
    if tiles:
        inputs["pixel_values"] = torch.from_numpy(np.concatenate(tiles))
    if clips:
        inputs["pixel_values_videos"] = torch.from_numpy(np.concatenate(clips))
    return inputs


def _pad(rows: list[np.ndarray], length: int, value: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.pad(row, (length - len(row), 0), constant_values=value) for row in rows]))
