"""The processor of an export, for messages whose media vLLM has fetched."""

from __future__ import annotations

import copy
import io
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image
from vllm.multimodal.image import open_image
from vllm.multimodal.media import MediaWithBytes

from framestream.pipeline.media.errors import MediaError
from framestream.trainer.standalone.media_inputs import ModelMedia
from framestream.trainer.standalone.processing_framestream import MARK, FramestreamProcessor


class ChatEncoder(FramestreamProcessor):
    """Reads media that vLLM has fetched, and encodes conversations about them."""

    _tokenizer_lock = threading.Lock()  #: a tokenizer changes its settings in a call

    def load(self, part: dict, most: int | None = None) -> dict:
        """Decode the video or open the image of a part.

        Args:
            part: has under its type a fetched file, or images or arrays; else as of ``FramestreamProcessor``.
            most: frames that are shown of a video, in complete clips; at most those of the export.

        Returns:
            the part with a :class:`ModelMedia` of a video, or an image

        Raises:
            ValueError: it cannot be used; one line.
        """
        if most is not None:
            return self._with_frames(most).load(part)
        kind = part["type"]
        value = part[kind]
        if kind == "image":
            return {**part, kind: open_image(io.BytesIO(value.original_bytes)) if _is_file(value) else value}
        if not _is_file(value):
            return {**part, kind: self._media(part, several=False)}
        frames, metadata = value.media
        if metadata:  # frames as JPEGs in one data address
            return {**part, kind: self._media({"fps": metadata["fps"], **part, kind: frames}, several=False)}
        with tempfile.NamedTemporaryFile(prefix="framestream-") as file:
            file.write(value.original_bytes)
            file.flush()
            try:
                return {**part, kind: self._media({**part, kind: file.name}, several=False)}
            except MediaError as error:
                raise ValueError(str(error).replace(file.name, "a video")) from None

    def encode(self, messages: Sequence[dict], add_generation_prompt: bool) -> list[int | ModelMedia]:
        """Encode a conversation whose parts :meth:`load` has returned; each media item is one entry.

        Raises:
            ValueError: a message has another form, or the conversation is too long.
        """
        with self._tokenizer_lock:
            return self._encode(messages, add_generation_prompt)

    def decode_row(self, row: Sequence[int | ModelMedia]) -> str:
        """Return the text of what :meth:`encode` returns, with ``<image>`` for media."""
        texts: list[str] = []
        ids: list[int] = []
        for entry in row:
            if isinstance(entry, ModelMedia):
                texts += [self.tokenizer.decode(ids), MARK]
                ids = []
            else:
                ids.append(entry)
        return "".join([*texts, self.tokenizer.decode(ids)])

    def _with_frames(self, most: int) -> ChatEncoder:
        """Return a copy that shows at most so many frames of a video."""
        clip = self.frames["clip_frames"]
        most = min(self.frames["max"], max(clip, most // clip * clip))
        other = copy.copy(self)
        other.frames = {**self.frames, "max": most, "min": min(self.frames["min"], most)}
        return other

    def _media(self, part: dict, several: bool) -> ModelMedia:
        value = part[part["type"]]
        return value if isinstance(value, ModelMedia) else super()._media(part, several)


@lru_cache
def load_encoder(model: str, revision: str | None) -> ChatEncoder:
    """Load the processor of an export, once in a process; it has a tokenizer of its own."""
    return ChatEncoder.from_pretrained(model, revision=revision or "main")


def check_pixels(kind: str, value: Any) -> None:
    """Check that a part has pixels and no path: messages may come from anywhere.

    Raises:
        ValueError: it has something else.
    """
    frames = value if kind == "video" and isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(frame, (np.ndarray, Image.Image)) for frame in frames):
        wanted = "an image or an array" if kind == "image" else "an array, or a list of images and arrays"
        raise ValueError(f"a part of type {kind} must be {wanted}; pass an address as a part of type {kind}_url")


def _is_file(value: Any) -> bool:
    return isinstance(value, MediaWithBytes)
