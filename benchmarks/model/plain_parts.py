"""Connector and vision tower written directly from their published description, as a reference for speed and results.

The arithmetic follows the publication step by step, with torch's own call for each step. Every round of merging moves
complete tokens. The tower runs clips and images one after the other as batches. Nothing is slow on purpose, and nothing
is optimized further.

Shapes: N clips, M images, T frames of a clip, S pixels along a side, L patches of a frame, t tokens, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.umt import BLOCK_EPS, FINAL_EPS, UMT


def plain_merge(tokens: torch.Tensor, wanted: int, heads: int) -> torch.Tensor:
    """Merge patches (N, t, C) to tokens (N, wanted, C), round by round (arXiv 2210.09461, appendix D)."""
    sizes = torch.ones_like(tokens[..., :1])  # (N, t, 1) patches in each token
    while tokens.shape[1] > wanted:
        tokens, sizes = merge_round(tokens, sizes, wanted, heads)
    return tokens


def merge_round(
    tokens: torch.Tensor, sizes: torch.Tensor, wanted: int, heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run one round on tokens (N, t, C) of ``sizes`` (N, t, 1) patches; return the remaining tokens and sizes."""
    n, t, c = tokens.shape
    removed = min(t // 2, t - wanted)
    with torch.no_grad():
        keys = tokens.reshape(n, t, heads, c // heads).mean(2)
        keys = keys / keys.norm(dim=-1, keepdim=True)
        scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)  # (N, even, odd)
        best, choice = scores.max(dim=-1)
        order = best.argsort(dim=-1, descending=True).unsqueeze(-1)
        moving, staying = order[:, :removed], order[:, removed:]
        target = choice.unsqueeze(-1).gather(1, moving)

    def merge(x: torch.Tensor) -> torch.Tensor:
        even, odd = x[:, ::2], x[:, 1::2]
        stay = even.gather(1, staying.expand(-1, -1, x.shape[-1]))
        move = even.gather(1, moving.expand(-1, -1, x.shape[-1]))
        return torch.cat([stay, odd.scatter_reduce(1, target.expand_as(move), move, reduce="sum")], dim=1)

    total = merge(sizes)
    return merge(tokens * sizes) / total, total


class PlainTower(nn.Module):
    """UMT with the published parameters: a convolution, blocks over a batch, a norm.

    Args:
        cfg: architecture.
        tower: tower whose parameters and positions are shared, not copied.
    """

    def __init__(self, cfg: VisionTowerConfig, tower: UMT):
        super().__init__()
        step = (1, cfg.patch, cfg.patch)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, cfg.width, step, stride=step)})
        self.blocks = nn.ModuleList(PlainBlock(cfg) for _ in range(cfg.depth - 1))
        self.vision_layernorm = nn.LayerNorm(cfg.width, eps=FINAL_EPS)
        self.load_state_dict(tower.state_dict(keep_vars=True), assign=True)
        self.clip_positions, self.image_positions = tower.clip_positions, tower.tile_positions

    def forward(self, clips: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips (N, 3, T, S, S) and images (M, 3, 1, S, S) to (N, T L, C) and (M, L, C)."""
        return self.encode(clips, self.clip_positions), self.encode(images, self.image_positions)

    def encode(self, pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Encode pixels (N, 3, T, S, S) to patches (N, T L, C)."""
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2) + positions
        for block in self.blocks:
            x = block(x)
        return self.vision_layernorm(x)


class PlainBlock(nn.Module):
    """Pre-norm transformer block over a batch (N, t, C)."""

    def __init__(self, cfg: VisionTowerConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(cfg.width, eps=BLOCK_EPS)
        self.attn = PlainAttention(cfg.width, cfg.heads)
        self.norm2 = nn.LayerNorm(cfg.width, eps=BLOCK_EPS)
        hidden = int(cfg.width * cfg.mlp_ratio)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(cfg.width, hidden), "fc2": nn.Linear(hidden, cfg.width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class PlainAttention(nn.Module):
    """Self-attention over a batch (N, t, C), with a bias on queries and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, c = x.shape
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(n, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
