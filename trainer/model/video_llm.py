"""VideoLLM: vision tower -> connector -> language model, on packed rows.

    clips, stills (uint8)                                      input_ids
        | normalised on the device                                 |
    vision tower, in batch.groups groups  ->  merged tokens    embeddings
        |                                                          |
    connector, once          ->   visual tokens replace the IMAGE places
                                                                   |
                               language model, once: causal within each dialogue
                                                                   |
                               head, once: sum of token_weight x cross entropy

Every part is called the same number of times whatever a row holds, because ZeRO-3 gathers parameters inside module
calls and ranks that call differently wait for each other for ever. A group without clips and stills encodes one dummy
still; its tokens enter the row multiplied by zero, so gradients are zero and not missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX
from framestream.trainer.model.attention import PACKED, AttentionSegments
from framestream.trainer.model.internvideo2 import InternVideo2
from framestream.trainer.model.lm_head import ChunkedLMHead
from framestream.trainer.model.tome import ToMeConnector
from framestream.trainer.model.umt import UMT

MEAN = (0.485, 0.456, 0.406)  #: ImageNet
STD = (0.229, 0.224, 0.225)
TOWER_CLASSES = {"umt": UMT, "internvideo2": InternVideo2}


class VideoLLM(nn.Module):
    """The whole model.

    Args:
        cfg: architecture of the three parts.
        size: S, pixels along a side of a frame.
        clip_frames: T, frames of a clip.
        recompute: gradient checkpointing of tower groups and language-model layers while training.
    """

    def __init__(self, cfg: ModelConfig, size: int, clip_frames: int, recompute: bool = False):
        super().__init__()
        tower, hidden = cfg.vision_tower, cfg.language_model.hidden_size
        self.recompute = recompute
        self.vision_tower = TOWER_CLASSES[tower.type](tower, size, clip_frames)
        self.connector = ToMeConnector(tower.width, hidden, tower.heads)
        self.language_model = build_language_model(cfg.language_model)
        if recompute:
            model = self.language_model  # transformers renamed the method in 5.23
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        for name, values in (("mean", MEAN), ("std", STD)):
            colours = torch.from_numpy(np.array(values, dtype=np.float32)).view(1, 3, 1, 1, 1)
            self.register_buffer(name, colours, persistent=False)

    def parts(self) -> dict[str, nn.Module]:
        """The three parts that a manifest freezes, trains and initialises."""
        return {
            "vision_tower": self.vision_tower,
            "connector": self.connector,
            "language_model": self.language_model,
        }

    def forward(self, batch: Batch) -> torch.Tensor:
        """Loss of a row: float32 scalar, sum of token_weight x cross entropy over its labelled places."""
        return self.language_model.lm_head(self.hidden(batch), batch.labels, batch.token_weight)

    def hidden(self, batch: Batch, cache=None) -> torch.Tensor:
        """Last hidden states of a row: (L, H). A transformers ``cache`` is filled with the row's keys and values."""
        output = self.language_model.model(
            inputs_embeds=self.embed(batch).unsqueeze(0),
            position_ids=batch.position_ids.unsqueeze(0),
            past_key_values=cache,
            use_cache=cache is not None,
            segments=AttentionSegments.of_cu_seqlens(batch.cu_seqlens),
        )
        return output.last_hidden_state.squeeze(0)

    def embed(self, batch: Batch) -> torch.Tensor:
        """Embeddings of a row, with visual tokens at the IMAGE places: (L, H)."""
        visual = self.visual_tokens(batch)
        image = batch.input_ids == IMAGE_TOKEN_INDEX
        text = self.language_model.model.embed_tokens(batch.input_ids.masked_fill(image, 0))
        places = image.nonzero().squeeze(1)
        merged = text.index_copy(0, places, visual[batch.visual_index].to(text.dtype))
        return merged + 0 * visual.sum().to(text.dtype)

    def visual_tokens(self, batch: Batch) -> torch.Tensor:
        """Tokens of the row's clips, then of its stills, then of dummies: (64 (N + M + dummies), H)."""
        trained = any(parameter.requires_grad for parameter in self.vision_tower.parameters())
        merged, start = [], 0
        for clips, stills in split_groups(batch):
            end = start + len(clips) + len(stills)
            units = (
                (clips, stills) if batch.drop_path_rand is None else (clips, stills, batch.drop_path_rand[start:end])
            )
            if trained and self.recompute and self.training:
                merged.append(checkpoint(self.encode, *units, use_reentrant=False))
            else:
                with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
                    merged.append(self.encode(*units))
            start = end
        return self.connector(*(torch.cat(units) for units in zip(*merged, strict=True)))

    def encode(
        self, clips: torch.Tensor, stills: torch.Tensor, *draws: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One group through the tower, merged to tokens (all that is kept of a group for the backward pass).

        Args:
            clips: uint8 (n, T, S, S, 3).
            stills: uint8 (m, S, S, 3).
            draws: random numbers of the n + m, for towers that need them, float32 (n + m, .).

        Returns:
            (n, 64, C) and (m, 64, C)
        """
        return self.connector.merge(*self.vision_tower(self.pixels(clips), self.pixels(stills.unsqueeze(1)), *draws))

    def pixels(self, frames: torch.Tensor) -> torch.Tensor:
        """uint8 (n, T, S, S, 3) -> normalised (n, 3, T, S, S) in the tower's dtype."""
        scaled = frames.movedim(-1, 1).float() / 255
        return ((scaled - self.mean) / self.std).to(self.vision_tower.patch_embed.proj.weight.dtype)

    def _apply(self, fn, recurse: bool = True):
        """Cast and move as usual, but keep constants (positions, RoPE frequencies, colours) in float32."""
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
    """The row's clips, then its stills, as ``batch.groups`` groups of nearly equal numbers of units.

    Yields:
        clips uint8 (n, T, S, S, 3) and stills uint8 (m, S, S, 3); a group of neither has one black dummy still.
    """
    clips, stills = batch.clips, batch.image_tiles
    share, longer = divmod(len(clips) + len(stills), batch.groups)
    start = 0
    for group in range(batch.groups):
        end = start + share + (group < longer)
        n = len(clips)
        group_stills = stills[max(start - n, 0) : max(end - n, 0)]
        if start == end:
            group_stills = stills.new_zeros(1, *stills.shape[1:])
        yield clips[start:end], group_stills
        start = end


def build_language_model(cfg: LanguageModelConfig) -> Qwen2ForCausalLM:
    """Qwen2 with packed attention and the chunked loss head; weights are not initialised."""
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
        attn_implementation=PACKED,
    )
    with no_init_weights():
        model = Qwen2ForCausalLM(config)
    model.lm_head = ChunkedLMHead(model.model.embed_tokens if cfg.tie_word_embeddings else model.lm_head)
    # Made anew from numpy: inside DeepSpeed's zero.Init torch would have computed the frequencies in 16 bit.
    width = cfg.hidden_size // cfg.num_attention_heads
    exponent = torch.from_numpy(np.arange(0, width, 2, dtype=np.float32)) / width
    rotary = model.model.rotary_emb
    rotary.inv_freq, rotary.original_inv_freq = 1.0 / cfg.rope_theta**exponent, 1.0 / cfg.rope_theta**exponent
    return model


def build_model(manifest: Manifest, device: str = "cpu") -> VideoLLM:
    """The manifest's model, its weights not yet initialised (``framestream.trainer.weights.load.initialize`` does that).

    ``device="meta"`` allocates nothing, for counting. Works inside ``deepspeed.zero.Init()`` too.
    """
    with torch.device(device), no_init_weights():
        return VideoLLM(
            manifest.model, manifest.frames.size, manifest.frames.clip_frames, manifest.train.gradient_checkpointing
        )
