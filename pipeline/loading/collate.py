"""Dialogues to a row: media expanded, positions, weights, and where each visual token comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.tiling import raster_order
from framestream.pipeline.shards.media_view import MediaView
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True, slots=True)
class MicroStep:
    """Where a row stands in its epoch, and what the plan says about its global batch; see :class:`Batch`."""

    epoch: int = 0
    step: int = 0
    index: int = 0
    count: int = 1
    total_weight: float = 0.0
    groups: int = 1


@dataclass(frozen=True, slots=True)
class PackedSample:
    """One dialogue of a row, its media read."""

    key: str
    ids: np.ndarray  #: int32 (n,), IMAGE once per medium
    labels: np.ndarray  #: int32 (n,)
    weight: float  #: of the loss at each labelled place
    views: list[MediaView]
    clips: np.ndarray  #: uint8 (N_c, T, S, S, 3), clips of the dialogue in order of use
    tiles: np.ndarray  #: uint8 (N_s, S, S, 3)


def collate(
    place: MicroStep, pieces: list[PackedSample], clips: np.ndarray, stills: np.ndarray, skipped: list[tuple[str, str]]
) -> Batch:
    """The row of ``pieces``, whose clips and stills are ``clips`` and ``stills`` in order."""
    ids, labels, positions, weights, visual = [], [], [], [], []
    clip, tile = 0, len(clips) * TOKENS_PER_CLIP
    for piece in pieces:
        repeats = np.ones(len(piece.ids), dtype=np.int64)
        repeats[piece.ids == IMAGE_TOKEN_INDEX] = [view.tokens for view in piece.views]
        ids.append(np.repeat(piece.ids, repeats))
        labels.append(np.repeat(piece.labels, repeats))
        positions.append(np.arange(len(ids[-1])))
        weights.append(np.where(labels[-1] == IGNORE_INDEX, 0, piece.weight))
        for view in piece.views:
            if view.clips:
                visual.append(np.arange(clip, clip + view.tokens))
                clip += view.tokens
            else:
                visual.append(tile + _still_order(view))
                tile += view.tokens
    if not pieces:
        ids, labels, positions, weights = [[0]], [[IGNORE_INDEX]], [[0]], [[0]]
    return Batch(
        epoch=place.epoch,
        step=place.step,
        micro_step=place.index,
        num_micro_steps=place.count,
        is_last=place.index + 1 == place.count,
        keys=[piece.key for piece in pieces],
        input_ids=_tensor(ids, np.int64),
        labels=_tensor(labels, np.int64),
        position_ids=_tensor(positions, np.int64),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *map(len, ids)]).astype(np.int32)),
        token_weight=_tensor(weights, np.float32),
        total_weight=place.total_weight,
        clips=torch.from_numpy(clips),
        image_tiles=torch.from_numpy(stills),
        visual_index=_tensor(visual, np.int64),
        groups=place.groups,
        skipped=skipped,
    )


def _still_order(view: MediaView) -> np.ndarray:
    return np.arange(TOKENS_PER_TILE) if view.grid is None else raster_order(view.grid)


def _tensor(parts: list, dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype=dtype))
