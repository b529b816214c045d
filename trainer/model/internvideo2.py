"""InternVideo2: a video transformer over clips of a few frames with learned positions; a tile is a clip of one frame.

    frames -> 14 x 14 patches, a class token before them -> + learned positions -> pre-norm blocks -> patches alone

A block normalizes queries and keys over all heads together, and scales both of its branches by a learned vector (layer
scale). While training, it drops a branch at random (drop path, arXiv 1603.09382). Block i of ``depth`` drops a branch
of a clip or a tile with probability p = drop_path * i / (depth - 1), and divides the other branches by 1 - p. The
random numbers are passed in the call, so that recomputation drops the same branches.

As in :mod:`framestream.trainer.model.umt`, clips and tiles go through the blocks in one call, and the published
encoder's last block is neither run nor built. There is no last norm. The class token takes part in attention and is
not returned.

Shapes: N clips, M tiles, T frames of a clip, S pixels along a side, L patches of a frame, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.attention import AttentionSegments, attend
from framestream.trainer.model.umt import TABLE_FRAMES, Mlp, PatchEmbed, resize_pos_embed
from framestream.trainer.model.vision_tower import VisionTower

POS_EMBED_FRAMES = {"pos_embed": TABLE_FRAMES, "img_pos_embed": 1}  #: table of learned positions -> its frames
PRETRAINED_FRAMES = 8  #: frames of the tables in encoders of an earlier stage of the published training
LAYER_SCALE = 1e-5  #: start value
NORM_EPS = 1e-6  #: of every norm


class InternVideo2(VisionTower):
    """The vision tower.

    Args:
        cfg: architecture.
        size: S, a multiple of ``cfg.patch``.
        frames: T.
    """

    def __init__(self, cfg: VisionTowerConfig, size: int, frames: int = TABLE_FRAMES) -> None:
        super().__init__(cfg, size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + frames * self.patches, cfg.width))
        self.img_pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patches, cfg.width))
        self.patch_embed = PatchEmbed(cfg.width, cfg.patch)
        hidden, rise = int(cfg.width * cfg.mlp_ratio), (cfg.drop_path or 0.0) / (cfg.depth - 1)
        self.blocks = nn.ModuleList(
            InternVideo2Block(cfg.width, cfg.heads, hidden, rise * i) for i in range(cfg.depth - 1)
        )
        self.num_drop_path_rands = 2 * len(self.blocks) if rise else 0

    def encode_patches(
        self,
        clips: torch.Tensor,
        tiles: torch.Tensor,
        drop_path_rand: torch.Tensor | None = None,
        anchor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips and tiles together, as described in :class:`VisionTower`."""
        rands: Sequence[torch.Tensor | None] = [None] * len(self.blocks)
        if self.training and self.num_drop_path_rands:
            if drop_path_rand is None:
                fix = "pass drop_path_rand (framestream.trainer.training.drop_path_rng)"
                raise ValueError(f"drop path needs random numbers while training; {fix}")
            rands = drop_path_rand.split(2, dim=1)
        images = clips.transpose(1, 2).flatten(0, 1)
        images = torch.cat([images, tiles.squeeze(2)]) if len(tiles) else images  # (N T + M, 3, S, S)
        patches = self.patch_embed(images, anchor)
        frames = len(clips) * clips.shape[2]
        clip_tokens = self._tokens(patches[:frames], len(clips), self.pos_embed)
        tile_tokens = self._tokens(patches[frames:], len(tiles), self.img_pos_embed)
        runs = [(tokens.shape[0], tokens.shape[1]) for tokens in (clip_tokens, tile_tokens)]
        segments = AttentionSegments.of_runs(runs, patches.device)
        x = torch.cat([clip_tokens.flatten(0, 1), tile_tokens.flatten(0, 1)])  # (tokens, C)
        for block, rand in zip(self.blocks, rands, strict=True):
            x = block(x, segments, rand)
        split = clip_tokens.shape[0] * clip_tokens.shape[1]
        return x[:split].view_as(clip_tokens)[:, 1:], x[split:].view_as(tile_tokens)[:, 1:]

    def _tokens(self, patches: torch.Tensor, count: int, positions: torch.Tensor) -> torch.Tensor:
        """Add class token and positions to patches (frames, L, C) of ``count`` clips or tiles: (count, 1 + ., C)."""
        _, length, width = positions.shape
        patches = patches.reshape(count, length - 1, width)
        return torch.cat([self.cls_token.expand(count, -1, -1), patches], dim=1) + positions


class InternVideo2Block(nn.Module):
    """Pre-norm transformer block over packed tokens (tokens, C); ``drop``: probability that a branch is dropped."""

    def __init__(self, width: int, heads: int, hidden: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = InternVideo2Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden)
        self.ls2 = LayerScale(width)

    def forward(self, x: torch.Tensor, segments: AttentionSegments, rand: torch.Tensor | None) -> torch.Tensor:
        """Run the block; ``rand`` (segments, 2) holds a number for each of the two branches, None drops nothing."""
        first, second = (None, None) if rand is None else rand.unbind(1)
        x = x + drop_path(self.ls1(self.attn(self.norm1(x), segments)), segments, self.drop, first)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), segments, self.drop, second)


class InternVideo2Attention(nn.Module):
    """Self-attention without a bias on queries, keys and values; queries and keys are normalized over all channels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, segments: AttentionSegments) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (self.q_norm(q), self.k_norm(k), v))
        return self.proj(attend(q, k, v, segments, causal=False).flatten(1))


class LayerScale(nn.Module):
    """A learned factor for every channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def drop_path(x: torch.Tensor, segments: AttentionSegments, drop: float, rand: torch.Tensor | None) -> torch.Tensor:
    """Set the segments of (tokens, C) whose number in ``rand`` is below ``drop`` to zero.

    The others are divided by 1 - ``drop``. Without ``rand``, ``x`` is returned unchanged.
    """
    if not drop or rand is None:
        return x
    lengths = segments.cu_seqlens.diff()
    factors = (rand >= drop).to(x.dtype) / (1 - drop)
    return x * factors.repeat_interleave(lengths, output_size=len(x)).unsqueeze(1)


def pos_embed_grid(rows: int, frames: int) -> tuple[int, int] | None:
    """Find (frames, side) of a position table with ``rows`` rows, one of them the class row; None if none fits.

    A table is for ``frames`` frames, or a clip's table for ``PRETRAINED_FRAMES``. Of 4 and 8 frames only one can fit:
    4 a^2 = 8 b^2 has no solution in integers.
    """
    for count in (frames, PRETRAINED_FRAMES) if frames > 1 else (frames,):
        side = math.isqrt(max(rows - 1, 0) // count)
        if side and 1 + count * side**2 == rows:
            return count, side
    return None


def interpolate_pos_embed(table: torch.Tensor, frames: int, side: int) -> torch.Tensor:
    """Resize a checkpoint's positions (1, 1 + f s s, C) to (1, 1 + frames * side * side, C).

    They are resized linearly over time, then bicubically over a frame, in float32. The class row does not change.

    Raises:
        ValueError: no f and s fit the table.
    """
    found = pos_embed_grid(table.shape[1], frames)
    if found is None:
        raise ValueError(f"a table of {table.shape[1]} rows does not fit square patch grids of {frames} frames")
    positions = table[0, 1:].float().unflatten(0, (found[0], found[1], found[1]))
    resized = resize_pos_embed(positions, frames, side).flatten(0, 2)
    return torch.cat([table[0, :1], resized.to(table.dtype)]).unsqueeze(0)


def init_pos_embed(width: int, frames: int, side: int) -> torch.Tensor:
    """Compute the start values of a position table: float32 (1, 1 + frames * side * side, width), its class row zero.

    The first quarter of the channels encodes the frame, the rest column and row in equal shares. Each share of n
    channels is sin, then cos, of p / 10000^(2 i / n) for i < n / 2.
    """
    time, row, column = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    space = (width - width // 4) // 2
    waves = []
    for position, channels in ((time, width // 4), (column, space), (row, space)):
        angle = position.reshape(-1, 1) / 10000.0 ** (np.arange(channels // 2) * 2 / channels)
        waves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(waves, axis=1).astype(np.float32)
    return torch.from_numpy(np.concatenate([np.zeros_like(table[:1]), table])).unsqueeze(0)
