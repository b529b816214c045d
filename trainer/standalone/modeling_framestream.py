"""The exported model, for ``AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)``.

    clips, tiles (uint8) -> vision tower -> merged tokens -> connector -> visual tokens
                                                                              |
    input_ids -> embeddings, replaced by visual tokens where visual_index says so -> Qwen2 of transformers -> logits

The vision tower and the connector are the modules of training. The language model is that of transformers, so its
attention implementations, caches and ways of generating work as for Qwen2. Tensors have their published names.

Shapes: B rows of L tokens, H channels of a token, N clips of T frames and M tiles of S x S pixels in all rows together.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen2ForCausalLM, Qwen2Model

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.internvideo2 import InternVideo2
from framestream.trainer.model.tome import ToMeConnector
from framestream.trainer.model.umt import UMT
from framestream.trainer.model.vision_tower import VisionTower
from framestream.trainer.standalone.configuration_framestream import FramestreamConfig

PIXEL_INPUTS = ("pixel_values", "pixel_values_videos")  #: inputs that have no row for each row of the batch


class FramestreamModel(Qwen2Model):
    """Qwen2 without its head, with a vision tower and a connector under their published names."""

    def __init__(self, config: FramestreamConfig) -> None:
        super().__init__(config)
        section, frames = config.framestream["model"]["vision_tower"], config.framestream["frames"]
        cfg = VisionTowerConfig(**{**section, "drop_path": 0.0})  # drop path belongs to training
        self._size, self._clip_frames = frames["size"], frames["clip_frames"]
        tower = {"umt": UMT, "internvideo2": InternVideo2}[cfg.type](cfg, self._size, self._clip_frames)
        self._constants = {name: buffer.clone() for name, buffer in tower.named_buffers()}
        inner = nn.ModuleDict({"encoder": tower}) if cfg.type == "umt" else tower
        self.vision_tower = nn.ModuleDict({"vision_tower": inner})
        self.mm_projector = ToMeConnector(cfg.width, config.hidden_size)
        self.post_init()

    @property
    def tower(self) -> VisionTower:
        """The vision tower itself."""
        inner = self.vision_tower["vision_tower"]
        return inner["encoder"] if isinstance(inner, nn.ModuleDict) else inner  # type: ignore[return-value]

    def visual_tokens(self, clips: torch.Tensor | None, tiles: torch.Tensor | None) -> torch.Tensor:
        """Compute the tokens of clips, then of tiles: (64 (N + M), H).

        Args:
            clips: uint8 (N, T, S, S, 3); None for no clips.
            tiles: uint8 (M, S, S, 3); None for no tiles.
        """
        given = clips if clips is not None else tiles
        if given is None:
            raise ValueError("visual_index is given without pixels; pass pixel_values or pixel_values_videos, too")
        side = self._size
        if clips is None:
            clips = given.new_empty(0, self._clip_frames, side, side, 3)
        if tiles is None:
            tiles = given.new_empty(0, side, side, 3)
        self._restore_constants()
        return self.mm_projector(self.tower(clips, tiles))

    def _restore_constants(self) -> None:
        """Set positions, mean and std of the tower: loading a model leaves them empty, and casting rounds them."""
        tower = self.tower
        device = next(tower.parameters()).device
        for name, values in self._constants.items():
            setattr(tower, name, values.to(device))


class FramestreamForCausalLM(Qwen2ForCausalLM):
    """The complete model. Its inputs are those of ``FramestreamProcessor``."""

    config_class = FramestreamConfig
    _no_split_modules = ["Qwen2DecoderLayer", "UMT", "InternVideo2"]

    def __init__(self, config: FramestreamConfig) -> None:
        super().__init__(config)
        self.model = FramestreamModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_index: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Compute logits, and with ``labels`` the loss, as Qwen2 does.

        Args:
            visual_index: int64 (B, L), for each token -1, or its row in the tokens of all clips, then of all tiles.
            pixel_values: uint8 (M, S, S, 3), the tiles of all images.
            pixel_values_videos: uint8 (N, T, S, S, 3), the clips of all videos.
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache, logits_to_keep,
                kwargs: as of Qwen2.
        """
        cache = past_key_values if past_key_values is not None else kwargs.get("cache")
        is_start = cache is None or cache.get_seq_length() == 0
        if inputs_embeds is None and visual_index is not None and is_start and input_ids is not None:
            inputs_embeds = self.embed(input_ids, visual_index, pixel_values, pixel_values_videos)
            input_ids = None
        if position_ids is None and is_start and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # padding on the left has no position
        if past_key_values is not None:
            kwargs["past_key_values"] = past_key_values
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def embed(
        self,
        input_ids: torch.Tensor,
        visual_index: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the embeddings (B, L, H), with visual tokens where ``visual_index`` is not negative.

        Arguments as of :meth:`forward`. ``input_ids`` may be longer, as when answers are generated without a cache.
        """
        index = F.pad(visual_index, (0, input_ids.shape[1] - visual_index.shape[1]), value=-1)
        is_visual = index >= 0
        text = self.get_input_embeddings()(input_ids.masked_fill(is_visual, 0))
        tokens = self.model.visual_tokens(pixel_values_videos, pixel_values).to(text)
        return text.masked_scatter(is_visual.unsqueeze(-1), tokens[index[is_visual].to(tokens.device)])

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> Any:
        """Repeat the rows for beams or several answers; pixels stay, because ``visual_index`` counts in all of them."""
        pixels = {name: model_kwargs.pop(name) for name in PIXEL_INPUTS if name in model_kwargs}
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]  # its self is a protocol
        given = {"is_encoder_decoder": is_encoder_decoder, "input_ids": input_ids, **model_kwargs}
        input_ids, model_kwargs = expand(expand_size=expand_size, **given)
        return input_ids, {**model_kwargs, **pixels}
