"""Prompts of requests: what the model is shown, with the pixels of those media whose visual tokens are not kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import TOKENS_PER_TILE
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.collate import MicroStep, PackedSample, collate
from framestream.pipeline.shards.media_view import MediaView
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.trainer.inference.byte_cache import ByteCache
from framestream.trainer.inference.generation import PrefillState, prefill
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.media import RequestMedia, UploadReader, limit_frames

TOKEN_CHARACTERS = 128  #: of the longest token of a tokenizer


@dataclass(frozen=True, slots=True)
class KeptMedia:
    """What the model is shown of a media item, as visual tokens."""

    view: MediaView
    tokens: torch.Tensor  #: (n, 64, C) of its clips or tiles, before the connector


@dataclass(frozen=True, slots=True)
class ServingPrompt:
    """A prompt that the model can run."""

    row: Batch  #: one dialogue, on the CPU and without pixels
    views: list[MediaView]
    keys: list[tuple]  #: of each media item in the cache
    kept: dict[tuple, KeptMedia]  #: those whose visual tokens were kept
    pixels: dict[tuple, np.ndarray]  #: of the others, uint8, clips (n, T, S, S, 3) or tiles (n, S, S, 3)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt, visual ones included."""
        return len(self.row.input_ids)


class PromptPreparer:
    """Makes prompts on the CPU. Threads may share it."""

    def __init__(
        self,
        manifest: Manifest,
        template: ChatTemplate,
        reader: UploadReader,
        cache: ByteCache[KeptMedia],
        config: ServingConfig,
    ) -> None:
        self._manifest, self._template, self._config = manifest, template, config
        self._reader, self._cache = reader, cache

    def prepare(
        self, turns: Sequence[dict[str, str]], media: Sequence[RequestMedia], frames: int | None
    ) -> ServingPrompt:
        """Make the prompt of a dialogue; media without kept tokens are decoded.

        Args:
            turns: as :meth:`framestream.trainer.inference.predictor.Predictor.build_prompt` takes them.
            frames: the most frames of a video; None for as many as the manifest says.

        Raises:
            RequestError: a file cannot be used, or the prompt exceeds a limit.
        """
        self._check_length(turns)
        manifest = limit_frames(self._manifest, frames)
        kinds = [self._reader.kind(item, manifest) for item in media]
        several = kinds.count("image") > 1
        keys = [
            (*item.key, *((several,) if kind == "image" else (manifest.frames.min, manifest.frames.max)))
            for item, kind in zip(media, kinds, strict=True)
        ]
        kept: dict[tuple, KeptMedia] = {}
        pixels: dict[tuple, np.ndarray] = {}
        views: list[MediaView] = []
        count = 0
        for item, key in zip(media, keys, strict=True):
            if key not in pixels and key not in kept and (found := self._cache.get(key)) is not None:
                kept[key] = found
            if key in kept:
                view = kept[key].view
            else:
                shown = self._reader.show(item, manifest, several)
                view, pixels[key] = shown.view, shown.pixels
            views.append(view)
            count += len(view.frame_indices) + view.tiles
            if count > self._config.max_frames:
                text = f"the media have over {self._config.max_frames:,} frames and tiles; send fewer or shorter ones"
                raise RequestError(413, text, "too_many_frames", item.param)
        return ServingPrompt(self._build_row(turns, views), views, keys, kept, pixels)

    def _check_length(self, turns: Sequence[dict[str, str]]) -> None:
        """Refuse a text that is far too long for the model before it is tokenized."""
        limit = self._manifest.model.language_model.max_position_embeddings
        if (length := sum(len(turn["value"]) for turn in turns)) > limit * TOKEN_CHARACTERS:
            text = f"the texts have {length:,} characters, and the limit of the model is {limit:,} tokens; shorten them"
            raise RequestError(400, text, "context_length_exceeded", "messages")

    def _build_row(self, turns: Sequence[dict[str, str]], views: list[MediaView]) -> Batch:
        try:
            ids = self._template.prompt(turns, [view.kind for view in views], [view.message for view in views])
        except ValueError as error:
            raise RequestError(400, str(error), "invalid_value", "messages") from None
        tokens = len(ids) - len(views) + sum(view.tokens for view in views)
        limit = self._manifest.model.language_model.max_position_embeddings
        if tokens >= limit:
            text = f"the prompt has {tokens:,} tokens, and the limit of the model is {limit:,}; shorten it"
            raise RequestError(400, text, "context_length_exceeded", "messages")
        # the shapes say how many clips and tiles there are; the pixels are elsewhere
        clips = np.empty((sum(view.clips for view in views), 0, 0, 0, 3), dtype=np.uint8)
        tiles = np.empty((sum(view.tiles for view in views), 0, 0, 3), dtype=np.uint8)
        sample = PackedSample("", ids, np.full_like(ids, IGNORE_INDEX), 0.0, views, clips, tiles)
        return collate(MicroStep(), [sample], clips, tiles, [])


class PromptRunner:
    """Runs prompts on the model, and keeps the visual tokens of their media. One thread uses it."""

    def __init__(self, model: VideoLLM, device: torch.device, manifest: Manifest, cache: ByteCache[KeptMedia]) -> None:
        self._model, self._device, self._cache = model, device, cache
        self._clip_frames = manifest.frames.clip_frames
        shape = 1, TOKENS_PER_TILE, manifest.model.vision_tower.width
        self._no_tokens = torch.zeros(shape, device=device, dtype=next(model.vision_tower.parameters()).dtype)

    @torch.no_grad()
    def run(self, prompt: ServingPrompt) -> PrefillState:
        """Return the state after the prompt."""
        known = dict(prompt.kept)
        for key, view in zip(prompt.keys, prompt.views, strict=True):
            if key not in known:
                pixels = prompt.pixels.pop(key)
                found = self._cache.peek(key)  # another request may have shown the same meanwhile
                known[key] = KeptMedia(view, self._encode(pixels)) if found is None else found
                self._cache.put(key, known[key], known[key].tokens.nbytes)
        shown = [known[key] for key in prompt.keys]
        ordered = [item.tokens for item in shown if item.view.clips] + [
            item.tokens for item in shown if item.view.tiles
        ]
        row = dataclasses.replace(prompt.row, unit_tokens=torch.cat(ordered) if ordered else self._no_tokens)
        return prefill(self._model, [row.to(self._device)])

    def _encode(self, pixels: np.ndarray) -> torch.Tensor:
        """Encode the clips or the tiles of one media item: (n, 64, C)."""
        units = torch.from_numpy(pixels).to(self._device)
        size = units.shape[-3:]
        if units.ndim == 5:
            return self._model.vision_tower(units, units.new_empty((0, *size)))
        return self._model.vision_tower(units.new_empty((0, self._clip_frames, *size)), units)
