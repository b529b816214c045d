"""Media of a prompt as inputs of the model, and their places among its tokens, in vLLM's interfaces.

The renderer has read the media: items here are :class:`ModelMedia`. A prompt has one mark for each of them, a negative
number, which no text and no tokenizer gives. It is replaced by as many tokens as the medium has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import MultiModalDataItems, MultiModalDataParser, ProcessorBatchItems
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    ProcessorInputs,
    PromptReplacement,
)

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.trainer.standalone.media_inputs import ModelMedia
from framestream.trainer.vllm_plugin.chat_encoder import ChatEncoder, load_encoder

MARKS = {"image": -1, "video": -2}  #: tokens that stand for one medium


class MediaItems(ProcessorBatchItems[ModelMedia]):
    """Images or videos of a prompt."""

    def get_item_for_hash(self, index: int) -> list[np.ndarray]:
        """Return what decides the tokens of an item, by which vLLM finds it in its caches."""
        item = self.data[index]
        return [item.clips] if self.modality == "video" else [item.tiles, item.order]


class MediaParser(MultiModalDataParser):
    """Takes media that the renderer has read, and no others."""

    def _get_subparsers(self) -> Mapping[str, Any]:
        return {modality: partial(self._parse_media, modality=modality) for modality in MARKS}

    def _parse_media(self, data: Any, modality: str) -> MediaItems:
        if not isinstance(data, list) or not all(isinstance(item, ModelMedia) for item in data):
            raise VLLMValidationError(f"{modality}: media are parts of messages; use LLM.chat or /v1/chat/completions")
        return MediaItems(data, modality)


class MediaInfo(BaseProcessingInfo):
    """What vLLM asks about the media of a model."""

    def get_hf_processor(self, **kwargs: object) -> ChatEncoder:
        """Return the processor of the export."""
        return load_encoder(self.ctx.model_config.model, self.ctx.model_config.revision)

    def get_data_parser(self) -> MediaParser:
        """Return the parser of media."""
        return MediaParser()

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return how many media a prompt may have: any number."""
        return dict.fromkeys(MARKS)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """Return the most tokens of an item of each kind."""
        return {modality: len(self.largest(modality).order) for modality in mm_counts}

    def largest(self, modality: str) -> ModelMedia:
        """Return a black item with the most tokens that the settings allow."""
        encoder = self.get_hf_processor()
        frames, images = encoder.frames, encoder.images
        side, clips, tiles = frames["size"], 0, 0
        if modality == "video":
            clips = -(-frames["max"] // frames["clip_frames"])
        else:
            tiles = 1 if images["mode"] == "square" else images["max_grid"] ** 2 + 1
        return ModelMedia(
            clips=np.zeros((clips, frames["clip_frames"], side, side, 3), dtype=np.uint8),
            tiles=np.zeros((tiles, side, side, 3), dtype=np.uint8),
            order=np.arange(TOKENS_PER_CLIP * clips + TOKENS_PER_TILE * tiles),
            message="",
        )


class LargestInputs(BaseDummyInputsBuilder[MediaInfo]):
    """Inputs with which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """Return no text: the prompt has marks alone."""
        return ""

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> dict[str, Any]:
        """Return the largest media."""
        return {modality: [self.info.largest(modality)] * count for modality, count in mm_counts.items()}


class MediaProcessor(BaseMultiModalProcessor[MediaInfo]):
    """Puts media into tensors, and their tokens into prompts."""

    @cached_property
    def filler(self) -> int:
        """The id of tokens whose embeddings are those of media."""
        return self.info.get_hf_processor().tokenizer.pad_token_id or 0

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> ProcessorInputs:
        """Return a prompt with the largest media."""
        data = self.dummy_inputs.get_dummy_mm_data(seq_len, mm_counts, mm_options)
        marks = [MARKS[modality] for modality, count in mm_counts.items() for _ in range(count)]
        return ProcessorInputs(prompt=marks, mm_data_items=self.info.parse_mm_data(data, validate=False))

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> BatchFeature:
        """Join the arrays of all items of a kind.

        Returns:
            ``clips`` uint8 (N, T, S, S, 3) and ``clip_counts`` int64 (videos,); ``tiles`` uint8 (M, S, S, 3),
            ``tile_counts`` int64 (images,) and ``tile_order`` int64 (64 M,), which counts in the image of its token.
        """
        arrays: dict[str, torch.Tensor] = {}
        for modality, items in mm_items.items():
            media: Sequence[ModelMedia] = items.get_all()
            if not media:
                continue
            if modality == "video":
                arrays["clips"] = torch.from_numpy(np.concatenate([item.clips for item in media]))
                arrays["clip_counts"] = torch.tensor([len(item.clips) for item in media])
            else:
                arrays["tiles"] = torch.from_numpy(np.concatenate([item.tiles for item in media]))
                arrays["tile_counts"] = torch.tensor([len(item.tiles) for item in media])
                arrays["tile_order"] = torch.from_numpy(np.concatenate([item.order for item in media]))
        return BatchFeature(arrays)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        none = torch.empty(0, dtype=torch.int64)
        clips, tiles = hf_inputs.get("clip_counts", none), hf_inputs.get("tile_counts", none)
        return {
            "clips": MultiModalFieldConfig.flat_from_sizes("video", clips),
            "clip_counts": MultiModalFieldConfig.batched("video", keep_on_cpu=True),
            "tiles": MultiModalFieldConfig.flat_from_sizes("image", tiles),
            "tile_counts": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "tile_order": MultiModalFieldConfig.flat_from_sizes("image", tiles * TOKENS_PER_TILE),
        }

    def _get_prompt_updates(
        self, mm_items: MultiModalDataItems, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> list[PromptReplacement]:
        def tokens(index: int, items: Any) -> list[int]:
            return [self.filler] * len(items[index].order)

        return [
            PromptReplacement(modality, target=[MARKS[modality]], replacement=partial(tokens, items=items))
            for modality, items in mm_items.items()
        ]
