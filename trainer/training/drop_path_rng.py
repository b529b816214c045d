"""What is drawn at random while training: a function of the seed, the global batch and the dialogue alone.

So a dialogue is dropped the same paths wherever it stands: in whatever row, on whatever rank, in a resumed run, and
again where the tower is recomputed for the backward pass.
"""

from __future__ import annotations

import hashlib

import torch

from framestream.pipeline.config.model import TOKENS_PER_TILE
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.tokenization.special_ids import IMAGE_TOKEN_INDEX


def drop_path_random(batch: Batch, seed: int, numbers: int) -> torch.Tensor | None:
    """``Batch.draws``: uniform random numbers in [0, 1), float32 (U, numbers); None where none are wanted.

    Of the U rows the first are for the batch's clips, then its stills; dummy stills of groups without either have ones,
    which drop nothing.
    """
    if not numbers:
        return None
    units = len(batch.clips) + len(batch.image_tiles)
    drawn = torch.ones(max(units, batch.groups), numbers)
    dialogues = unit_sample_ids(batch)
    for number, key in enumerate(batch.keys):
        mine = (dialogues == number).nonzero().squeeze(1)
        digest = hashlib.sha256(f"{seed}:{batch.epoch}:{batch.step}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        drawn[mine] = torch.rand(len(mine), numbers, generator=generator)
    return drawn


def unit_sample_ids(batch: Batch) -> torch.Tensor:
    """Which of the row's dialogues each clip, then each still, belongs to: int64 (N_c + N_s,)."""
    places = (batch.input_ids == IMAGE_TOKEN_INDEX).nonzero().squeeze(1)
    dialogues = torch.full((len(batch.clips) + len(batch.image_tiles),), -1)
    dialogues[batch.visual_index // TOKENS_PER_TILE] = (
        torch.searchsorted(batch.cu_seqlens.long(), places, right=True) - 1
    )
    return dialogues
