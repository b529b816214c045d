"""Run the vision tower over pixels that arrive a few at a time; only the tokens of a group stay in memory.

The groups are those of :func:`framestream.trainer.model.vision_tower.split_groups` over all units at once. So the
tokens are those of one call of the tower, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from framestream.pipeline.evaluation.pixel_stream import Pixels


class Tower(Protocol):
    """What a stream needs of a :class:`framestream.trainer.model.vision_tower.VisionTower`."""

    patches: int  #: of a frame
    group_limit: int  #: patches of a group

    def __call__(self, clips: torch.Tensor, tiles: torch.Tensor, /) -> torch.Tensor: ...


class StreamEncoder:
    """Encodes a stream of pixels: ``encode`` of :class:`framestream.pipeline.evaluation.prompts.PromptBuilder`.

    Args:
        tower: in eval mode.
        device: of the tower and of the tokens.
    """

    def __init__(self, tower: Tower, device: torch.device) -> None:
        self._tower, self._device = tower, device

    @torch.no_grad()
    def __call__(self, pixels: Iterable[Pixels]) -> torch.Tensor:
        """Return the tokens of all clips, then of all tiles: (units, 64, C).

        Args:
            pixels: at least one clip or tile; clips before tiles.
        """
        return torch.cat(list(encode_groups(self._tower, units_of(pixels), self._device)))


def units_of(pixels: Iterable[Pixels]) -> Iterator[Pixels]:
    """Yield each clip, and then each tile, as pixels of their own."""
    for clips, tiles in pixels:
        yield from ((clip, tiles[:0]) for clip in clips.split(1) if len(clip))
        yield from ((clips[:0], tile) for tile in tiles.split(1) if len(tile))


def encode_groups(tower: Tower, units: Iterable[Pixels], device: torch.device) -> Iterator[torch.Tensor]:
    """Encode units in as large groups as the tower takes; yield the tokens of each group, (units, 64, C).

    Args:
        units: as of :func:`units_of`. Those of one group are in memory at a time.
    """
    group: list[Pixels] = []
    patches = 0
    for clip, tile in units:
        size = tower.patches * (len(clip) * clip.shape[1] + len(tile))
        if group and patches + size > tower.group_limit:
            yield _encode(tower, group, device)
            group, patches = [], 0
        group.append((clip, tile))
        patches += size
    if group:
        yield _encode(tower, group, device)


def _encode(tower: Tower, group: list[Pixels], device: torch.device) -> torch.Tensor:
    clips, tiles = (torch.cat(parts) for parts in zip(*group, strict=True))
    return tower(clips.to(device), tiles.to(device))
