"""UMT: a video transformer over clips of a few frames; an image tile is a clip of one frame.

    frames -> 16 x 16 patches -> + fixed positions -> pre-norm blocks, attention over all frames of a clip -> LayerNorm

Clips and tiles go through the blocks in one call: linear layers and norms over the tokens of both, attention within
each clip and each tile. The published model takes the features before the last of the encoder's ``depth`` blocks. So
the last block is neither run nor built.

Shapes: N clips, M tiles, T frames of a clip, S pixels along a side, L patches of a frame, C channels.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.attention import AttentionSegments, attend
from framestream.trainer.model.vision_tower import VisionTower

TABLE_FRAMES = 4  #: frames that the published position table is computed for
BLOCK_EPS = 1e-6  #: of the norms in blocks
FINAL_EPS = 1e-12  #: of the last norm


class UMT(VisionTower):
    """The vision tower.

    Args:
        cfg: architecture.
        size: S, a multiple of ``cfg.patch``.
        frames: T.
    """

    clip_positions: torch.Tensor  #: float32 (T L, C)
    tile_positions: torch.Tensor  #: float32 (L, C)

    def __init__(self, cfg: VisionTowerConfig, size: int, frames: int = TABLE_FRAMES) -> None:
        super().__init__(cfg, size)
        self.patch_embed = PatchEmbed(cfg.width, cfg.patch)
        hidden = int(cfg.width * cfg.mlp_ratio)
        self.blocks = nn.ModuleList(UMTBlock(cfg.width, cfg.heads, hidden) for _ in range(cfg.depth - 1))
        self.vision_layernorm = nn.LayerNorm(cfg.width, eps=FINAL_EPS)
        side = size // cfg.patch
        clip_positions = sinusoid_pos_embed(cfg.width, TABLE_FRAMES, cfg.table_side, frames, side)
        tile_positions = sinusoid_pos_embed(cfg.width, 1, cfg.table_side, 1, side)
        self.register_buffer("clip_positions", clip_positions, persistent=False)
        self.register_buffer("tile_positions", tile_positions, persistent=False)

    def encode_patches(
        self,
        clips: torch.Tensor,
        tiles: torch.Tensor,
        drop_path_rand: torch.Tensor | None = None,
        anchor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips and tiles together, as described in :class:`VisionTower`; there is no drop path."""
        images = clips.transpose(1, 2).flatten(0, 1)
        images = torch.cat([images, tiles.squeeze(2)]) if len(tiles) else images  # (N T + M, 3, S, S)
        patches = self.patch_embed(images, anchor)
        clip_tokens = patches[: len(clips) * clips.shape[2]].reshape(len(clips), *self.clip_positions.shape)
        tile_tokens = patches[len(clips) * clips.shape[2] :]
        clip_tokens = clip_tokens + self.clip_positions.to(patches.dtype)
        tile_tokens = tile_tokens + self.tile_positions.to(patches.dtype)
        runs = [(tokens.shape[0], tokens.shape[1]) for tokens in (clip_tokens, tile_tokens)]
        segments = AttentionSegments.of_runs(runs, patches.device)
        x = torch.cat([clip_tokens.flatten(0, 1), tile_tokens.flatten(0, 1)])  # (tokens, C)
        for block in self.blocks:
            x = block(x, segments)
        x = self.vision_layernorm(x)
        split = clip_tokens.shape[0] * clip_tokens.shape[1]
        return x[:split].view_as(clip_tokens), x[split:].view_as(tile_tokens)


class PatchEmbed(nn.Module):
    """Cut images into patches and project them."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.proj = PatchProjection(3, width, (1, patch, patch), stride=(1, patch, patch))

    def forward(self, images: torch.Tensor, anchor: torch.Tensor | None = None) -> torch.Tensor:
        """(P, 3, S, S) -> (P, L, C)"""
        return self.proj(images, anchor)


class PatchProjection(nn.Conv3d):
    """A convolution over patches that do not overlap, computed as one matrix product.

    The weight keeps the published shape (C, 3, 1, patch, patch).
    """

    def forward(self, images: torch.Tensor, anchor: torch.Tensor | None = None) -> torch.Tensor:
        """(P, 3, S, S) -> (P, L, C), patches row by row. ``anchor`` changes nothing (``VisionTower.forward``)."""
        p = self.kernel_size[-1]
        images = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (P, 3, rows, p, columns, p)
        patches = images.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)  # (P L, 3 p p)
        bias = self.bias if self.bias is None or anchor is None else self.bias + 0 * anchor
        return F.linear(patches, self.weight.flatten(1), bias).unflatten(0, (len(images), -1))


class UMTBlock(nn.Module):
    """Pre-norm transformer block over packed tokens (tokens, C)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=BLOCK_EPS)
        self.attn = UMTAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=BLOCK_EPS)
        self.mlp = Mlp(width, hidden)

    def forward(self, x: torch.Tensor, segments: AttentionSegments) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), segments)
        return x + self.mlp(self.norm2(x))


class UMTAttention(nn.Module):
    """Self-attention with a bias on queries and values and none on keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Projection(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, segments: AttentionSegments) -> torch.Tensor:
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = self.qkv(x, bias).unflatten(-1, (3, self.heads, -1)).unbind(1)
        return self.proj(attend(q, k, v, segments, causal=False).flatten(1))


class Projection(nn.Linear):
    """A linear layer that gets its bias in the call, so that adding it takes no extra pass over the tokens."""

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, self.weight, bias)


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def sinusoid_pos_embed(width: int, table_frames: int, table_side: int, frames: int, side: int) -> torch.Tensor:
    """Compute fixed sin-cos positions, resized to a clip: float32 (frames * side * side, width).

    Position p of the ``table_frames * table_side**2`` positions of a flat table has sin on even and cos on odd channels
    of p / 10000^(2 floor(c / 2) / width). If the number of frames differs, the table is resized linearly over time.
    If the side differs, each frame is then resized bicubically. Corners are not aligned.

    The table starts in numpy, because DeepSpeed's ``zero.Init`` changes the dtype of tensors that torch creates.
    """
    channel = np.arange(width)
    angle = np.arange(table_frames * table_side**2)[:, None] / 10000.0 ** (2 * (channel // 2) / width)
    angle[:, 0::2], angle[:, 1::2] = np.sin(angle[:, 0::2]), np.cos(angle[:, 1::2])
    table = torch.from_numpy(angle.astype(np.float32)).view(table_frames, table_side, table_side, width)
    return resize_pos_embed(table, frames, side).reshape(frames * side * side, width).contiguous()


def resize_pos_embed(table: torch.Tensor, frames: int, side: int) -> torch.Tensor:
    """Resize positions (f, s, s, C) to (frames, side, side, C): linear over time, then bicubic over a frame."""
    if frames != table.shape[0]:
        over_time = table.permute(1, 2, 3, 0).flatten(0, 1)  # (positions of a frame, C, f)
        resized = F.interpolate(over_time, size=frames, mode="linear", align_corners=False)
        table = resized.unflatten(0, table.shape[1:3]).permute(3, 0, 1, 2)
    if side != table.shape[1]:
        channels_first = table.permute(0, 3, 1, 2)
        resized = F.interpolate(channels_first, size=(side, side), mode="bicubic", align_corners=False)
        table = resized.permute(0, 2, 3, 1)
    return table
