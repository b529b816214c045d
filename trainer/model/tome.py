"""ToMe16 MLP connector: merge each clip's and each tile's patches to a fixed number of tokens, then two linear layers.

Merging is bipartite soft matching (arXiv 2210.09461) in rounds, until ``wanted`` tokens are left. A round on t tokens
removes r = min(floor(t / 2), t - wanted) of them:

    - a token's key is its channels averaged over heads, scaled to unit length;
    - every token at an even position chooses the most similar (cosine) token at an odd position;
    - the r even tokens most similar to their choice are merged into it, by averages weighted with the number of
      patches of each token;
    - new order: the remaining even tokens by falling similarity, then all odd tokens in their old order.

Keys are linear in the tokens, their length does not matter, and the choices carry no gradient. So the rounds run on
sums of keys alone, without gradient. They only decide which patches belong to which token. A token is then the average
of its patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE


class ToMeConnector(nn.Module):
    """Turns merged patches of the vision tower into tokens of the language model.

    Args:
        width: channels of a merged patch.
        hidden: channels of a token.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    def forward(self, merged: torch.Tensor) -> torch.Tensor:
        """Compute the tokens of clips and tiles: (U, 64, C), as :func:`merge_units` gives them, -> (64 U, hidden)."""
        return self.mlp(merged.flatten(0, 1))


def merge_units(clips: torch.Tensor, tiles: torch.Tensor, heads: int) -> torch.Tensor:
    """Merge the patches of clips (N, P, C), then of tiles (M, Q, C): (N + M, 64, C).

    Args:
        heads: attention heads of the tower; a key is the mean over them.
    """
    return torch.cat([merge(clips, TOKENS_PER_CLIP, heads), merge(tiles, TOKENS_PER_TILE, heads)])


def merge(patches: torch.Tensor, wanted: int, heads: int) -> torch.Tensor:
    """Merge (N, P, C) patches to (N, wanted, C) tokens; P = wanted returns them unchanged.

    Raises:
        ValueError: there are fewer patches than ``wanted``.
    """
    count = patches.shape[1]
    if count < wanted:
        raise ValueError(f"{count} patches cannot be merged to {wanted} tokens; use larger frames or a smaller patch")
    if count == wanted:
        return patches
    return pool(patches, assign_tokens(patches, wanted, heads), wanted, "mean")


@torch.no_grad()
def assign_tokens(patches: torch.Tensor, wanted: int, heads: int) -> torch.Tensor:
    """Assign each of (N, P, C) patches to one of ``wanted`` tokens: int64 (N, P).

    Runs on all N at once and never waits for the device.
    """
    keys = patches.unflatten(-1, (heads, -1)).mean(2, dtype=torch.float32)  # (N, t, C / heads), summed over a token
    token = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)  # (N, P)
    while keys.shape[1] > wanted:
        tokens = keys.shape[1]
        removed = min(tokens // 2, tokens - wanted)
        moved = bipartite_soft_matching(keys, removed)  # (N, t) new position of every token
        keys = pool(keys, moved, tokens - removed, "sum")
        token = moved.gather(1, token)
    return token


def bipartite_soft_matching(keys: torch.Tensor, removed: int) -> torch.Tensor:
    """Run one round on (N, t, c) float32 keys of any length.

    Returns:
        (N, t), the position of each token among the t - removed that remain.
    """
    keys = F.normalize(keys, dim=-1)
    even, odd = keys[:, 0::2], keys[:, 1::2]
    similarity, choice = (even @ odd.mT).max(dim=-1)  # (N, evens)
    order = similarity.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=keys.device).expand_as(order))
    remaining = even.shape[1] - removed  # even tokens that are not merged; odd tokens follow them
    position = torch.empty(keys.shape[:2], dtype=torch.int64, device=keys.device)
    position[:, 0::2] = torch.where(rank < removed, remaining + choice, rank - removed)
    position[:, 1::2] = remaining + torch.arange(odd.shape[1], device=keys.device)
    return position


def pool(rows: torch.Tensor, group: torch.Tensor, groups: int, mode: str) -> torch.Tensor:
    """Compute the "sum" or "mean" of the rows of each group: (N, P, C) -> (N, groups, C).

    Rows of a group are added in their order, on GPUs too, so the result is deterministic. Nothing waits for the device.
    Gradients flow to the rows.

    Args:
        rows: (N, P, C).
        group: int64 (N, P), the group of each row, below ``groups``.
        groups: how many groups each of the N has.
        mode: "sum" or "mean"; a group without rows gives zeros.
    """
    ordered, order = group.sort(dim=1, stable=True)
    first = torch.searchsorted(ordered, torch.arange(groups, device=group.device).repeat(len(group), 1))  # (N, groups)
    before = rows.shape[1] * torch.arange(len(rows), device=group.device).unsqueeze(1)  # rows of the clips before
    pooled = F.embedding_bag((order + before).flatten(), rows.flatten(0, 1), (first + before).flatten(), mode=mode)
    return pooled.unflatten(0, (len(rows), groups))
