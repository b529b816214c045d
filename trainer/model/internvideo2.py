"""InternVideo2: a video transformer over clips of a few frames with learned positions, and stills as one frame.

    frames -> 14 x 14 patches, a class token before them -> + learned positions -> pre-norm blocks -> patches alone

A block normalises queries and keys over all heads together, scales both of its branches by a learned vector (layer
scale) and, while training, drops a branch at random (drop path, arXiv 1603.09382): block i of ``depth`` leaves it out
for a clip or a still with probability drop_path * i / (depth - 1) and divides the others by what is left of 1. The
random numbers are given in the call, so that recomputation drops the same.

As in ``framestream.trainer.model.umt``, clips and stills go through the blocks in one call, and the published encoder's last block
is not run, so it is not built. There is no last norm; the class token takes part in attention and ends here.

Shapes: N clips, M stills, T frames of a clip, S pixels along a side, L patches of a frame, C channels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.attention import AttentionSegments, attend
from framestream.trainer.model.umt import TABLE_FRAMES, Mlp, PatchEmbed, resize_pos_embed

POS_EMBED_FRAMES = {"pos_embed": TABLE_FRAMES, "img_pos_embed": 1}  #: learned positions and how many frames they are for
PRETRAINED_FRAMES = 8  #: encoders of an earlier stage of the published training have tables for as many
LAYER_SCALE = 1e-5  #: start value
NORM_EPS = 1e-6  #: of every norm


class InternVideo2(nn.Module):
    """The vision tower.

    Args:
        cfg: architecture.
        size: S, a multiple of ``cfg.patch``.
        frames: T.
    """

    def __init__(self, cfg: VisionTowerConfig, size: int, frames: int = TABLE_FRAMES):
        super().__init__()
        places = (size // cfg.patch) ** 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + frames * places, cfg.width))
        self.img_pos_embed = nn.Parameter(torch.zeros(1, 1 + places, cfg.width))
        self.patch_embed = PatchEmbed(cfg.width, cfg.patch)
        hidden, rise = int(cfg.width * cfg.mlp_ratio), (cfg.drop_path or 0.0) / (cfg.depth - 1)
        self.blocks = nn.ModuleList(
            InternVideo2Block(cfg.width, cfg.heads, hidden, rise * i) for i in range(cfg.depth - 1)
        )
        self.num_drop_path_rands = 2 * len(self.blocks) if rise else 0  #: random numbers that a clip or a still needs while training

    def forward(
        self, clips: torch.Tensor, stills: torch.Tensor, draws: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips and stills together; either may be empty, not both.

        Args:
            clips: (N, 3, T, S, S) normalised pixels.
            stills: (M, 3, 1, S, S) normalised pixels.
            draws: float32 (N + M, ``self.draws``) in [0, 1), for drop path while training.

        Returns:
            (N, T L, C) and (M, L, C)

        Raises:
            ValueError: training with drop path, and no ``draws``.
        """
        if self.training and self.num_drop_path_rands and draws is None:
            raise ValueError(
                "drop path needs random numbers while training; give draws (framestream.trainer.training.drop_path_rng)"
            )
        pictures = torch.cat([clips.transpose(1, 2).flatten(0, 1), stills.squeeze(2)])  # (N T + M, 3, S, S)
        patches = self.patch_embed(pictures)
        frames = len(clips) * clips.shape[2]
        of_clips = self._tokens(patches[:frames], len(clips), self.pos_embed)
        of_stills = self._tokens(patches[frames:], len(stills), self.img_pos_embed)
        runs = [of_clips.shape[:2], of_stills.shape[:2]]
        segments = AttentionSegments.of_runs([tuple(run) for run in runs], patches.device)
        x = torch.cat([of_clips.flatten(0, 1), of_stills.flatten(0, 1)])  # (tokens, C)
        drawn = draws.split(2, dim=1) if self.training and self.num_drop_path_rands else [None] * len(self.blocks)
        for block, two in zip(self.blocks, drawn, strict=True):
            x = block(x, segments, two)
        split = of_clips.shape[0] * of_clips.shape[1]
        return x[:split].view_as(of_clips)[:, 1:], x[split:].view_as(of_stills)[:, 1:]

    def _tokens(self, patches: torch.Tensor, count: int, positions: torch.Tensor) -> torch.Tensor:
        """Patches (frames, L, C) of ``count`` clips or stills, with class token and positions: (count, 1 + ., C)."""
        _, length, width = positions.shape
        patches = patches.reshape(count, length - 1, width)
        return torch.cat([self.cls_token.expand(count, -1, -1), patches], dim=1) + positions


class InternVideo2Block(nn.Module):
    """Pre-norm transformer block over packed tokens (tokens, C); ``drop``: how probably a branch is left out."""

    def __init__(self, width: int, heads: int, hidden: int, drop: float):
        super().__init__()
        self.drop = drop
        self.norm1 = nn.RMSNorm(width, eps=NORM_EPS)
        self.attn = InternVideo2Attention(width, heads)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.RMSNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, hidden)
        self.ls2 = LayerScale(width)

    def forward(self, x: torch.Tensor, segments: AttentionSegments, drawn: torch.Tensor | None) -> torch.Tensor:
        """``drawn`` (segments, 2): a random number for each of the two branches; None drops nothing."""
        first, second = (None, None) if drawn is None else drawn.unbind(1)
        x = x + drop_path(self.ls1(self.attn(self.norm1(x), segments)), segments, self.drop, first)
        return x + drop_path(self.ls2(self.mlp(self.norm2(x))), segments, self.drop, second)


class InternVideo2Attention(nn.Module):
    """Self-attention without a bias on queries, keys and values; queries and keys are normalised over all channels."""

    def __init__(self, width: int, heads: int):
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

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), LAYER_SCALE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def drop_path(x: torch.Tensor, segments: AttentionSegments, drop: float, drawn: torch.Tensor | None) -> torch.Tensor:
    """(tokens, C) with the segments whose ``drawn`` number is below ``drop`` set to zero, the others divided by
    1 - ``drop``; as it is where nothing is drawn."""
    if not drop or drawn is None:
        return x
    lengths = segments.cu_seqlens.diff()
    factors = (drawn >= drop).to(x.dtype) / (1 - drop)
    return x * factors.repeat_interleave(lengths, output_size=len(x)).unsqueeze(1)


def pos_embed_grid(rows: int, frames: int) -> tuple[int, int] | None:
    """(frames, side) of a position table with a class row and ``rows`` rows in all; None for no such table.

    A table is for ``frames`` frames, or a clip's for ``PRETRAINED_FRAMES``. For 4 and 8 frames only one of the two
    can be right: 4 a^2 = 8 b^2 has no solution in whole numbers.
    """
    for count in (frames, PRETRAINED_FRAMES) if frames > 1 else (frames,):
        side = math.isqrt(max(rows - 1, 0) // count)
        if side and 1 + count * side**2 == rows:
            return count, side
    return None


def interpolate_pos_embed(table: torch.Tensor, frames: int, side: int) -> torch.Tensor:
    """A checkpoint's positions (1, 1 + f s s, C) for another clip: (1, 1 + frames * side * side, C).

    Resized linearly over time, then bicubically over a frame, in float32; the class row stays.

    Raises:
        ValueError: no f and s fit the table.
    """
    found = pos_embed_grid(table.shape[1], frames)
    if found is None:
        raise ValueError(f"a table of {table.shape[1]} rows is for no whole number of patches and {frames} frames")
    places = table[0, 1:].float().unflatten(0, (found[0], found[1], found[1]))
    resized = resize_pos_embed(places, frames, side).flatten(0, 2)
    return torch.cat([table[0, :1], resized.to(table.dtype)]).unsqueeze(0)


def init_pos_embed(width: int, frames: int, side: int) -> torch.Tensor:
    """Start values of a position table: float32 (1, 1 + frames * side * side, width), its class row zero.

    The first quarter of the channels holds the frame, the rest column and row in equal shares; each share of n channels
    is sin, then cos, of p / 10000^(2 i / n) for i < n / 2.
    """
    time, row, column = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    space = (width - width // 4) // 2
    waves = []
    for place, channels in ((time, width // 4), (column, space), (row, space)):
        angle = place.reshape(-1, 1) / 10000.0 ** (np.arange(channels // 2) * 2 / channels)
        waves += [np.sin(angle), np.cos(angle)]
    table = np.concatenate(waves, axis=1).astype(np.float32)
    return torch.from_numpy(np.concatenate([np.zeros_like(table[:1]), table])).unsqueeze(0)
