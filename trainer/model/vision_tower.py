"""The vision tower's outer module: all clips and tiles of a row in one call, a group of them at a time.

    clips, tiles (uint8) -> normalized pixels -> patches of the encoder -> merged tokens

The units of a row (its clips, then its tiles) are divided into groups by their patches. Each rank divides its own row,
and tells other ranks nothing about it: the tower is a leaf module of ZeRO-3, which gathers all of its parameters in one
call and looks at no module inside. So the number of groups never changes the order of module calls.

A row without units encodes one black dummy tile. Its tokens enter the row multiplied by zero, so gradients are zero and
not missing.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from framestream.pipeline.config.model import VisionTowerConfig
from framestream.trainer.model.tome import merge_units

MEAN = (0.485, 0.456, 0.406)  #: ImageNet
STD = (0.229, 0.224, 0.225)
INDEX_LIMIT = 2**31  #: values of a group's patches; the backward pass of token merging has 32-bit indices


class VisionTower(nn.Module, abc.ABC):
    """Base class of vision towers.

    Args:
        cfg: architecture.
        size: S, a multiple of ``cfg.patch``.

    Attributes:
        recompute: gradient checkpointing of every group while training.
        preserve_rng_state: draw the same random numbers again when a group is computed again.
    """

    num_drop_path_rands = 0  #: random numbers that a clip or a tile needs while training
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, cfg: VisionTowerConfig, size: int) -> None:
        super().__init__()
        self.heads, self.recompute, self.preserve_rng_state = cfg.heads, False, False
        self.patches = (size // cfg.patch) ** 2  #: L, of a frame
        self.group_limit = min(cfg.group_tokens, (INDEX_LIMIT - 1) // cfg.width)  #: patches
        for name, values in (("mean", MEAN), ("std", STD)):
            channels = torch.from_numpy(np.array(values, dtype=np.float32)).view(1, 3, 1, 1, 1)
            self.register_buffer(name, channels, persistent=False)

    @property
    def is_trained(self) -> bool:
        """Whether a parameter of the tower is trained."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def forward(
        self,
        clips: torch.Tensor,
        tiles: torch.Tensor,
        anchor: torch.Tensor | None = None,
        drop_path_rand: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the merged tokens of a row's units.

        Args:
            clips: uint8 (N, T, S, S, 3).
            tiles: uint8 (M, S, S, 3).
            anchor: float32 scalar that needs a gradient where the tower is trained. It changes nothing. ZeRO-3 adds up
                the gradients of a leaf module when the gradient of its input is there, and pixels need none.
            drop_path_rand: random numbers of the units, for towers that need them, float32 (N + M, .).

        Returns:
            (N + M, 64, C), clips first; for N + M = 0, (1, 64, C) of a dummy unit.
        """
        groups, start = [], 0
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.is_trained):
            for group in split_groups(clips, tiles, self.patches, self.group_limit):
                end = start + len(group[0]) + len(group[1])
                rand = None if drop_path_rand is None else drop_path_rand[start:end]
                if self.recompute and self.training and torch.is_grad_enabled():
                    keep = self.preserve_rng_state
                    tokens = checkpoint(self.encode, *group, anchor, rand, use_reentrant=False, preserve_rng_state=keep)
                else:
                    tokens = self.encode(*group, anchor, rand)
                groups.append(tokens)
                start = end
            return torch.cat(groups)

    def encode(
        self, clips: torch.Tensor, tiles: torch.Tensor, anchor: torch.Tensor | None, rand: torch.Tensor | None
    ) -> torch.Tensor:
        """Encode one group and merge its patches; arguments as of :meth:`forward`.

        Only these tokens of a group stay in memory for the backward pass.
        """
        pixels = self.normalize(clips), self.normalize(tiles.unsqueeze(1))
        return merge_units(*self.encode_patches(*pixels, rand, anchor), self.heads)

    def normalize(self, frames: torch.Tensor) -> torch.Tensor:
        """Normalize frames: uint8 (n, T, S, S, 3) -> (n, 3, T, S, S) in the tower's dtype."""
        planes = frames.movedim(-1, 2).contiguous().float().transpose(1, 2)  # of images, one after the other
        return planes.div_(255).sub_(self.mean).div_(self.std).to(next(self.parameters()).dtype)

    @abc.abstractmethod
    def encode_patches(
        self,
        clips: torch.Tensor,
        tiles: torch.Tensor,
        drop_path_rand: torch.Tensor | None = None,
        anchor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode clips and tiles together; either may be empty, not both.

        Args:
            clips: (N, 3, T, S, S) normalized pixels.
            tiles: (M, 3, 1, S, S) normalized pixels.
            drop_path_rand: float32 (N + M, ``num_drop_path_rands``) in [0, 1), needed while training with drop path.
            anchor: of :meth:`forward`, added to the first bias: pixels then need no gradient, and the anchor's comes
                after those of all parameters.

        Returns:
            (N, T L, C) and (M, L, C)

        Raises:
            ValueError: training with drop path, and no ``drop_path_rand``.
        """


def split_groups(
    clips: torch.Tensor, tiles: torch.Tensor, patches: int, limit: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Divide clips, then tiles, into groups of as many units as have ``limit`` patches together, at least one unit.

    Args:
        clips: uint8 (N, T, S, S, 3), of T ``patches`` each.
        tiles: uint8 (M, S, S, 3), of ``patches`` each.

    Yields:
        clips uint8 (n, T, S, S, 3) and tiles uint8 (m, S, S, 3). If there is no unit at all, one black dummy tile.
    """
    if not len(clips) + len(tiles):
        tiles = tiles.new_zeros(1, *tiles.shape[1:])
    n = len(clips)
    sizes = [clips.shape[1] * patches] * n + [patches] * len(tiles)
    start = 0
    while start < len(sizes):
        end, room = start + 1, limit - sizes[start]
        while end < len(sizes) and sizes[end] <= room:
            room -= sizes[end]
            end += 1
        yield clips[start:end], tiles[max(start - n, 0) : max(end - n, 0)]
        start = end
