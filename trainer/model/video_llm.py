"""VideoLLM: vision tower -> connector -> language model, on packed rows.

    clips, tiles (uint8)                                       input_ids
        | normalized on the device                                 |
    vision tower, in batch.groups groups  ->  merged tokens    embeddings
        |                                                          |
    connector, once          ->   visual tokens replace the image ids
                                                                   |
                               language model, once: causal within each dialogue
                                                                   |
                               head, once: sum of token_weight x cross entropy

Every part is called the same number of times, whatever a row contains: ZeRO-3 gathers parameters inside module calls,
and ranks that call modules in different orders wait for each other forever. A group without clips and tiles encodes
one dummy tile. Its tokens enter the row multiplied by zero, so gradients are zero and not missing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, Qwen2Config, Qwen2ForCausalLM, Qwen2Model
from transformers.initialization import no_init_weights

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig
from framestream.pipeline.config.training import NO_RECOMPUTATION, Recomputation
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.model.attention import PACKED, AttentionSegments
from framestream.trainer.model.internvideo2 import InternVideo2
from framestream.trainer.model.lm_head import ChunkedLMHead
from framestream.trainer.model.tome import ToMeConnector
from framestream.trainer.model.umt import UMT

#: Keyword of the cache in calls of ``Qwen2Model``: transformers 5.24 renamed it, and 5.40 drops the old name.
CACHE_KEYWORD = "cache" if "cache" in inspect.signature(Qwen2Model.forward).parameters else "past_key_values"
MEAN = (0.485, 0.456, 0.406)  #: ImageNet
STD = (0.229, 0.224, 0.225)
TOWER_CLASSES: dict[str, type[UMT] | type[InternVideo2]] = {"umt": UMT, "internvideo2": InternVideo2}


class VideoLLM(nn.Module):
    """Vision tower, connector and language model.

    Args:
        cfg: architecture of the three parts.
        size: S, pixels along a side of a frame.
        clip_frames: T, frames of a clip.
        recompute: what the backward pass computes again while training.

    Attributes:
        vision_cache: replaces :meth:`encode` if set, such as
            :class:`framestream.trainer.inference.vision_cache.VisionFeatureCache`. Not for models that are trained.
    """

    vision_tower: UMT | InternVideo2
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self, cfg: ModelConfig, size: int, clip_frames: int, recompute: Recomputation = NO_RECOMPUTATION
    ) -> None:
        super().__init__()
        tower, hidden = cfg.vision_tower, cfg.language_model.hidden_size
        self.recompute = recompute.tower
        self.vision_cache: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
        self.vision_tower = TOWER_CLASSES[tower.type](tower, size, clip_frames)
        self.connector = ToMeConnector(tower.width, hidden, tower.heads)
        self.language_model = build_language_model(cfg.language_model)
        if recompute.layers:
            model = self.language_model  # transformers renamed the method in 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False, "preserve_rng_state": False})
            for layer in model.model.layers[recompute.layers :]:
                layer.gradient_checkpointing = False
        for name, values in (("mean", MEAN), ("std", STD)):
            channels = torch.from_numpy(np.array(values, dtype=np.float32)).view(1, 3, 1, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    def parts(self) -> dict[str, nn.Module]:
        """Return the three parts that a manifest freezes, trains and initializes."""
        return {
            "vision_tower": self.vision_tower,
            "connector": self.connector,
            "language_model": self.language_model,
        }

    def forward(self, batch: Batch) -> torch.Tensor:
        """Compute the loss of a row: float32 scalar, sum of token_weight x cross entropy over labelled positions."""
        return self.language_model.lm_head(self.hidden(batch), batch.labels, batch.token_weight, batch.label_positions)

    def hidden(self, batch: Batch, cache: Cache | None = None) -> torch.Tensor:
        """Compute the last hidden states of a row: (L, H). Its keys and values are put into ``cache``."""
        output = self.language_model.model(
            inputs_embeds=self.embed(batch).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            **{CACHE_KEYWORD: cache},
            use_cache=cache is not None,
            segments=AttentionSegments.of_lengths(batch.lengths, batch.cu_seqlens),
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
        """Compute the tokens of the row's clips, then of its tiles, then of dummies: (64 (N + M + dummies), H)."""
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        encode = self.vision_cache or self.encode
        merged, start = [], 0
        for clips, tiles in split_groups(batch):
            end = start + len(clips) + len(tiles)
            units: tuple[torch.Tensor, ...] = (clips, tiles)
            if batch.drop_path_rand is not None:
                units = (clips, tiles, batch.drop_path_rand[start:end])
            if trained and self.recompute and self.training:
                merged.append(checkpoint(encode, *units, use_reentrant=False))
            else:
                with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                    merged.append(encode(*units))
            start = end
        return self.connector(*(torch.cat(units) for units in zip(*merged, strict=True)))

    def encode(
        self, clips: torch.Tensor, tiles: torch.Tensor, *drop_path_rand: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one group through the tower and merge its patches to tokens.

        Only these tokens of a group stay in memory for the backward pass.

        Args:
            clips: uint8 (n, T, S, S, 3).
            tiles: uint8 (m, S, S, 3).
            drop_path_rand: random numbers of the n + m units, for towers that need them, float32 (n + m, .).

        Returns:
            (n, 64, C) and (m, 64, C)
        """
        patches = self.vision_tower(self.pixels(clips), self.pixels(tiles.unsqueeze(1)), *drop_path_rand)
        return self.connector.merge(*patches)

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalize frames: uint8 (n, T, S, S, 3) -> (n, 3, T, S, S) in the tower's dtype."""
        scaled = frames.movedim(-1, 1).float() / 255
        return ((scaled - self.mean) / self.std).to(self.vision_tower.patch_embed.proj.weight.dtype)

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


def split_groups(batch: Batch) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Divide the row's clips, then its tiles, into ``batch.groups`` groups of nearly equal numbers of units.

    Yields:
        clips uint8 (n, T, S, S, 3) and tiles uint8 (m, S, S, 3). A group of neither has one black dummy tile.
    """
    clips, tiles = batch.clips, batch.image_tiles
    share, longer = divmod(len(clips) + len(tiles), batch.groups)
    start = 0
    for group in range(batch.groups):
        end = start + share + (group < longer)
        n = len(clips)
        group_tiles = tiles[max(start - n, 0) : max(end - n, 0)]
        if start == end:
            group_tiles = tiles.new_zeros(1, *tiles.shape[1:])
        yield clips[start:end], group_tiles
        start = end


def build_language_model(cfg: LanguageModelConfig) -> Qwen2ForCausalLM:
    """Build Qwen2 with packed attention and the chunked loss head; weights are not initialized."""
    config = Qwen2Config(
        hidden_size=cfg.hidden_size,
        intermediate_size=cfg.intermediate_size,
        num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        num_key_value_heads=cfg.num_key_value_heads,
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_theta},
        rms_norm_eps=cfg.rms_norm_eps,
        tie_word_embeddings=cfg.tie_word_embeddings,
        attn_implementation=PACKED,  # type: ignore[call-arg]  # taken by the base class as one of its **kwargs
    )
    with no_init_weights():
        model = Qwen2ForCausalLM(config)
    model.lm_head = ChunkedLMHead(model.model.embed_tokens if cfg.tie_word_embeddings else model.lm_head)
    # Recomputed in numpy: inside DeepSpeed's zero.Init torch has computed the frequencies in 16 bit.
    width = cfg.hidden_size // cfg.num_attention_heads
    exponent = torch.from_numpy(np.arange(0, width, 2, dtype=np.float32)) / width
    rotary = model.model.rotary_emb
    rotary.inv_freq, rotary.original_inv_freq = 1.0 / cfg.rope_theta**exponent, 1.0 / cfg.rope_theta**exponent
    return model


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
