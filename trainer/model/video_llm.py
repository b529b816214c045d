"""VideoLLM: vision tower -> connector -> language model, on packed rows.

    clips, tiles (uint8)                                       input_ids
        |                                                          |
    vision tower, once (inside: group by group)                embeddings
        | merged tokens                                            |
        |                                                          |
    connector, once          ->   visual tokens replace the image ids
                                                                   |
                               language model, once: causal within each dialogue
                                                                   |
                               head, once: sum of token_weight x cross entropy

Every leaf module is called once, in the same order, whatever a row contains. ZeRO-3 gathers parameters in these calls.
Ranks that call leaf modules in different orders wait for each other forever. A rank whose order changes from row to row
gathers nothing ahead.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, Qwen2Model
from transformers.initialization import no_init_weights

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import ModelConfig
from framestream.pipeline.config.training import NO_RECOMPUTATION, Recomputation
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.model.attention import AttentionSegments
from framestream.trainer.model.internvideo2 import InternVideo2
from framestream.trainer.model.language_model import build_language_model
from framestream.trainer.model.tome import ToMeConnector
from framestream.trainer.model.umt import UMT
from framestream.trainer.model.vision_tower import VisionTower

#: Keyword of the cache in calls of ``Qwen2Model``: transformers 5.24 renamed it, and 5.40 drops the old name.
CACHE_KEYWORD = "cache" if "cache" in inspect.signature(Qwen2Model.forward).parameters else "past_key_values"
TOWER_CLASSES: dict[str, type[UMT] | type[InternVideo2]] = {"umt": UMT, "internvideo2": InternVideo2}


class VideoLLM(nn.Module):
    """Vision tower, connector and language model.

    Args:
        cfg: architecture of the three parts.
        size: S, pixels along a side of a frame.
        clip_frames: T, frames of a clip.
        recompute: what the backward pass computes again while training.
    """

    vision_tower: VisionTower

    def __init__(
        self, cfg: ModelConfig, size: int, clip_frames: int, recompute: Recomputation = NO_RECOMPUTATION
    ) -> None:
        super().__init__()
        tower, hidden = cfg.vision_tower, cfg.language_model.hidden_size
        self.vision_tower = TOWER_CLASSES[tower.type](tower, size, clip_frames)
        self.vision_tower.recompute = recompute.tower
        self.connector = ToMeConnector(tower.width, hidden)
        self.language_model = build_language_model(cfg.language_model)
        if recompute.layers:
            model = self.language_model  # transformers renamed the method in 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
            for layer in model.model.layers[recompute.layers :]:
                layer.gradient_checkpointing = False

    def parts(self) -> dict[str, nn.Module]:
        """Return the three parts that a manifest freezes, trains and initializes."""
        return {
            "vision_tower": self.vision_tower,
            "connector": self.connector,
            "language_model": self.language_model,
        }

    def keep_random_numbers(self) -> None:
        """Let what is computed again for the backward pass draw the same random numbers, which dropout needs."""
        self.vision_tower.preserve_rng_state = True
        for layer in self.language_model.model.layers:
            if function := getattr(layer, "_gradient_checkpointing_func", None):
                function.keywords["preserve_rng_state"] = True

    def leaf_modules(self) -> list[nn.Module]:
        """Return the modules that ZeRO-3 gathers as a unit, without hooks inside: the tower and the layers.

        Both call other modules a number of times that depends on the row or on recomputation.
        """
        return [self.vision_tower, *self.language_model.model.layers]

    def forward(self, batch: Batch, compute: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """Compute the loss of a row: float32 scalar, sum of token_weight x cross entropy over labelled positions.

        Args:
            batch: the row.
            compute: returned is its result instead, and ``batch`` is not used. Other uses of the parts, such as
                generation, are calls of the model for ZeRO-3 only inside of one.
        """
        if compute is not None:
            return compute()
        needed = batch.label_positions
        if len(needed):
            targets, weights = batch.labels[needed + 1], batch.token_weight[needed + 1]
        else:  # position 0 with weight 0: every parameter gets its (zero) gradient on every rank
            needed = targets = needed.new_zeros(1)
            weights = batch.token_weight.new_zeros(1)
        return self.language_model.lm_head(self.hidden(batch, needed), targets, weights)

    def hidden(self, batch: Batch, needed: torch.Tensor | None = None, cache: Cache | None = None) -> torch.Tensor:
        """Compute the last hidden states of a row: (K, H). Its keys and values are put into ``cache``.

        Args:
            needed: int64 (K,), ascending positions whose states are read; None for all, (L, H).
        """
        output = self.language_model.model(
            inputs_embeds=self.embed(batch).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            **{CACHE_KEYWORD: cache},
            use_cache=cache is not None,
            segments=AttentionSegments.of_lengths(batch.lengths, batch.cu_seqlens),
            needed=needed,
        )
        return output.last_hidden_state.squeeze(0)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Compute the embeddings of a row, with visual tokens at the positions of image ids: (L, H)."""
        visual = self.visual_tokens(batch)
        ids = batch.input_ids.index_fill(0, batch.image_positions, 0)
        text = self.language_model.model.embed_tokens(ids)
        merged = text.index_copy(0, batch.image_positions, visual[batch.visual_index].to(text.dtype))
        return merged + 0 * visual.sum().to(text.dtype)

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """Compute the tokens of the clips, then of the tiles: (64 (N + M), H), or (64, H) of a dummy for N + M = 0."""
        if batch.unit_tokens is not None:
            return self.connector(batch.unit_tokens)
        needs_grad = torch.is_grad_enabled() and self.vision_tower.is_trained
        anchor = torch.zeros((), device=batch.clips.device, requires_grad=needs_grad)
        rand = () if batch.drop_path_rand is None else (batch.drop_path_rand,)
        return self.connector(self.vision_tower(batch.clips, batch.image_tiles, anchor, *rand))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> VideoLLM:
        """Cast and move as usual, but leave constants (positions, RoPE frequencies, mean and std) in float32."""
        constants = [
            (module, name, buffer)
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in module._non_persistent_buffers_set
        ]
        super()._apply(fn, recurse)
        for module, name, buffer in constants:
            moved = getattr(module, name)
            if moved.dtype != buffer.dtype:
                setattr(module, name, buffer.to(moved.device))
        return self


def build_model(manifest: Manifest, device: str = "cpu") -> VideoLLM:
    """Build the manifest's model; :func:`framestream.trainer.weights.load.initialize` sets its weights.

    With ``device="meta"`` nothing is allocated, for counting. Works inside ``deepspeed.zero.Init()`` too.
    """
    with torch.device(device), no_init_weights():
        return VideoLLM(
            manifest.model,
            manifest.frames.size,
            manifest.frames.clip_frames,
            manifest.train.recomputation(manifest.model.language_model.num_hidden_layers),
        )
