"""The model for vLLM: the vision tower and the connector of training, and vLLM's own Qwen2.

    clips or tiles (uint8) -> vision tower, group by group -> connector -> embeddings of media -> Qwen2 of vLLM

Each worker has the complete tower: it is not divided by tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE, VisionTowerConfig
from framestream.trainer.model.tome import ToMeConnector
from framestream.trainer.model.video_llm import TOWER_CLASSES
from framestream.trainer.model.vision_tower import VisionTower
from framestream.trainer.vllm_plugin.processor import LargestInputs, MediaInfo, MediaProcessor


@MULTIMODAL_REGISTRY.register_processor(MediaProcessor, info=MediaInfo, dummy_inputs=LargestInputs)
class FramestreamForVLLM(nn.Module, SupportsMultiModal):
    """The complete model; tensors of files have their published names."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.vision_tower.vision_tower.encoder.": "vision_tower.",  # of UMT
            "model.vision_tower.vision_tower.": "vision_tower.",
            "model.mm_projector.": "connector.",
            "model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    vision_tower: VisionTower
    connector: ToMeConnector
    language_model: Any

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        """Return None: the renderer writes complete prompts."""
        return None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        section, frames = config.framestream["model"]["vision_tower"], config.framestream["frames"]
        cfg = VisionTowerConfig(**{**section, "drop_path": 0.0})  # drop path belongs to training
        self.clip_shape = (frames["clip_frames"], frames["size"], frames["size"], 3)
        with self._mark_tower_model(vllm_config, {"image", "video"}):  # type: ignore[operator]  # of vLLM
            self.vision_tower = TOWER_CLASSES[cfg.type](cfg, frames["size"], frames["clip_frames"])
            self.connector = ToMeConnector(cfg.width, config.hidden_size)
        device = next(self.connector.mlp.parameters()).device
        for module in self.vision_tower.modules():  # made in numpy, so not on the device of the weights
            for name, values in module.named_buffers(recurse=False):
                setattr(module, name, values.to(device))
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config, prefix=maybe_prefix(prefix, "language_model"), architectures=["Qwen2ForCausalLM"]
            )

    def embed_multimodal(self, **inputs: Any) -> list[torch.Tensor]:
        """Compute the embeddings of videos, then of images: (tokens, H) each.

        Args:
            inputs: of ``MediaProcessor``.
        """
        embeddings: list[torch.Tensor] = []
        if "clips" in inputs:
            clips = inputs["clips"]
            tokens = self.connector(self.vision_tower(clips, clips.new_empty(0, *clips.shape[2:])))
            embeddings += tokens.split((TOKENS_PER_CLIP * inputs["clip_counts"]).tolist())
        if "tiles" in inputs:
            tiles = inputs["tiles"]
            tokens = self.connector(self.vision_tower(tiles.new_empty(0, *self.clip_shape), tiles))
            sizes = (TOKENS_PER_TILE * inputs["tile_counts"]).tolist()
            pieces = zip(tokens.split(sizes), inputs["tile_order"].split(sizes), strict=True)
            embeddings += [piece[order] for piece, order in pieces]
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        """Compute hidden states, as Qwen2 does."""
        return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Compute logits, as Qwen2 does."""
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors by their published names; return the names of those that were set."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)
