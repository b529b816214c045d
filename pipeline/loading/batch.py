"""One row: what a rank runs in one micro-step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(slots=True)
class Batch:
    """Dialogues packed into one row of L tokens without padding, D of them, with their media.

    A row without dialogues has one token (id 0, label ``IGNORE``) and no keys, so that every rank runs the same calls.
    Tensors live on the CPU until ``to``; frames stay uint8 and are normalised on the device.
    """

    epoch: int
    step: int  #: number of the global batch in its epoch
    micro_step: int  #: which micro-step of the global batch
    num_micro_steps: int  #: micro-steps of this global batch, equal on all ranks
    is_last: bool  #: the global batch ends with this micro-step
    keys: list[str]  #: dialogue keys, in the order of ``cu_seqlens``
    input_ids: torch.Tensor  #: int64 (L,), IMAGE once per visual token
    labels: torch.Tensor  #: int64 (L,), not shifted; IGNORE where nothing is learned and at each dialogue's first token
    position_ids: torch.Tensor  #: int64 (L,), restarts at 0 with each dialogue
    cu_seqlens: torch.Tensor  #: int32 (D + 1,), where dialogues start and end; (0, 1) in an empty row
    token_weight: torch.Tensor  #: float32 (L,), weight of the loss at each labelled place, 0 elsewhere
    total_weight: float  #: planned weight of the whole global batch over all rows, unreadable dialogues included
    clips: torch.Tensor  #: uint8 (N_c, 4, S, S, 3)
    image_tiles: torch.Tensor  #: uint8 (N_s, S, S, 3), tiles of stills
    visual_index: torch.Tensor  #: int64 (V,): the row of concat(clip tokens, still tokens) for each IMAGE, in order
    groups: int  #: tower groups that every rank runs in this micro-step, at least 1
    drop_path_rand: torch.Tensor | None = (
        None  #: float32 (U, n), random numbers of each clip and still (trainer/training/drop_path_rng.py)
    )
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)  #: (dialogue key, reason) left out

    @property
    def tokens(self) -> int:
        """Tokens of the row, visual ones included; 0 for a row without dialogues."""
        return len(self.input_ids) if self.keys else 0

    @property
    def frames(self) -> int:
        """Pictures that go through the vision tower: frames of clips and tiles of stills."""
        return self.clips.shape[0] * self.clips.shape[1] + self.image_tiles.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in self._tensors().values())

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """A copy with every tensor on ``device``."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A copy with every tensor in page-locked memory, for asynchronous copies to a GPU."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def _mapped(self, function: Any) -> Batch:
        return dataclasses.replace(self, **{name: function(value) for name, value in self._tensors().items()})
