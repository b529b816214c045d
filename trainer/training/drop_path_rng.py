"""Random numbers for drop path: a function of the seed, the global batch and the dialogue alone.

So the same paths of a dialogue are dropped in any row, on any rank, in a resumed run, and again when the tower is
recomputed for the backward pass.
"""

from __future__ import annotations

import hashlib

import torch

from framestream.pipeline.config.model import TOKENS_PER_TILE
from framestream.pipeline.loading.batch import Batch


def drop_path_random(batch: Batch, seed: int, per_unit: int) -> torch.Tensor | None:
    """Return ``Batch.drop_path_rand``: uniform numbers in [0, 1), float32 (U, per_unit); None if ``per_unit`` is 0.

    The U rows are those of the batch's clips, then of its image tiles. A batch without either encodes a dummy image. It
    has ones, which drop nothing.
    """
    if not per_unit:
        return None
    units = len(batch.clips) + len(batch.image_tiles)
    numbers = torch.ones(max(units, 1), per_unit)
    dialogues = unit_sample_ids(batch)
    for dialogue, key in enumerate(batch.keys):
        rows = (dialogues == dialogue).nonzero().squeeze(1)
        digest = hashlib.sha256(f"{seed}:{batch.epoch}:{batch.step}:{key}".encode()).digest()
        # torch's seeds are signed: drop one of the 64 bits
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        numbers[rows] = torch.rand(len(rows), per_unit, generator=generator)
    return numbers


def seed_dropout(row: Batch, seed: int, rank: int, world: int) -> None:
    """Seed torch's random numbers for the dropout of adapters: by the row's number in its global batch.

    Rows do not depend on the number of ranks, so neither do the masks.
    """
    number = row.micro_step * world + rank
    digest = hashlib.sha256(f"{seed}:{row.epoch}:{row.step}:{number}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def unit_sample_ids(batch: Batch) -> torch.Tensor:
    """Return the index of the dialogue that each clip, then each image tile, belongs to: int64 (N_c + N_s,)."""
    dialogues = torch.full((len(batch.clips) + len(batch.image_tiles),), -1)
    # a visual token belongs to unit visual_index // TOKENS_PER_TILE, because a clip and a tile have as many tokens
    dialogues[batch.visual_index // TOKENS_PER_TILE] = (
        torch.searchsorted(batch.cu_seqlens.long(), batch.image_positions, right=True) - 1
    )
    return dialogues
