"""Collate dialogues into one packed row: visual tokens expanded, positions, weights and the index of visual tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.loading.batch import Batch, image_and_label_positions
from framestream.pipeline.media.tiling import raster_order
from framestream.pipeline.shards.media_view import MediaView
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True, slots=True)
class MicroStep:
    """Position of a row in its epoch, and what the plan says about its global batch; see :class:`Batch`."""

    epoch: int = 0
    step: int = 0
    index: int = 0  #: number of the micro-step in its global batch
    count: int = 1  #: micro-steps of the global batch
    total_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class PackedSample:
    """One dialogue of a row, with its decoded media."""

    key: str
    ids: np.ndarray  #: int32 (n,), IMAGE_TOKEN_INDEX once per media item
    labels: np.ndarray  #: int32 (n,)
    weight: float  #: loss weight of each labeled token
    views: list[MediaView]
    clips: np.ndarray  #: uint8 (N_c, T, S, S, 3), clips of the dialogue in order of use
    tiles: np.ndarray  #: uint8 (N_s, S, S, 3), image tiles of the dialogue in order of use


def collate(
    micro_step: MicroStep,
    samples: list[PackedSample],
    clips: np.ndarray,
    tiles: np.ndarray,
    skipped: list[tuple[str, str]],
) -> Batch:
    """Make the batch of a row.

    Args:
        micro_step: position of the row in its epoch.
        samples: dialogues of the row, in order.
        clips: uint8 (N_c, T, S, S, 3), clips of all samples in order.
        tiles: uint8 (N_s, S, S, 3), image tiles of all samples in order.
        skipped: (dialogue key, reason) of dialogues that were left out.
    """
    ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    visual_index: list[np.ndarray] = []
    num_clips = sum(view.clips for sample in samples for view in sample.views)
    clip_token, tile_token = 0, num_clips * TOKENS_PER_CLIP  # next rows of concat(clip tokens, image tokens)
    for sample in samples:
        repeats = np.ones(len(sample.ids), dtype=np.int64)
        repeats[sample.ids == IMAGE_TOKEN_INDEX] = [view.tokens for view in sample.views]
        ids.append(np.repeat(sample.ids, repeats))
        labels.append(np.repeat(sample.labels, repeats))
        positions.append(np.arange(len(ids[-1])))
        weights.append(np.where(labels[-1] == IGNORE_INDEX, 0, sample.weight))
        for view in sample.views:
            if view.clips:
                visual_index.append(np.arange(clip_token, clip_token + view.tokens))
                clip_token += view.tokens
            else:
                visual_index.append(tile_token + _tile_token_order(view))
                tile_token += view.tokens
    if not samples:
        ids, labels, positions, weights = ([np.array([value])] for value in (0, IGNORE_INDEX, 0, 0))
    input_ids, target_ids, lengths = _tensor(ids, np.int64), _tensor(labels, np.int64), [len(part) for part in ids]
    image_positions, label_positions = image_and_label_positions(input_ids, target_ids)
    return Batch(
        epoch=micro_step.epoch,
        step=micro_step.step,
        micro_step=micro_step.index,
        num_micro_steps=micro_step.count,
        is_last=micro_step.index + 1 == micro_step.count,
        keys=[sample.key for sample in samples],
        input_ids=input_ids,
        labels=target_ids,
        position_ids=_tensor(positions, np.int64),
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        lengths=lengths,
        image_positions=image_positions,
        label_positions=label_positions,
        token_weight=_tensor(weights, np.float32),
        total_weight=micro_step.total_weight,
        clips=torch.from_numpy(clips),
        image_tiles=torch.from_numpy(tiles),
        visual_index=_tensor(visual_index, np.int64),
        skipped=skipped,
    )


def _tile_token_order(view: MediaView) -> np.ndarray:
    return np.arange(TOKENS_PER_TILE) if view.grid is None else raster_order(view.grid)


def _tensor(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype=dtype))
