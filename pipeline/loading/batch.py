"""The batch: tensors of one packed row, which a rank runs in one micro-step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(slots=True)
class Batch:
    """One micro-batch: a packed row that a rank runs in one micro-step.

    The row has D dialogues with their media, L tokens in all, without padding. A row without dialogues has one token
    (id 0, label ``IGNORE_INDEX``) and no keys, so that every rank makes the same calls. Tensors are on the CPU until
    :meth:`to`. Pixels stay uint8 and are normalized on the device.

    What decides shapes and calls is known on the CPU: ``lengths``, and the sizes of ``image_positions`` and
    ``label_positions``. So no module has to wait for the device to look at ``input_ids``, ``labels`` or ``cu_seqlens``.
    """

    epoch: int
    step: int  #: number of the global batch in its epoch
    micro_step: int  #: number of the micro-step in its global batch
    num_micro_steps: int  #: micro-steps of this global batch, equal on all ranks
    is_last: bool  #: this micro-step is the last of its global batch
    keys: list[str]  #: dialogue keys, in the order of ``cu_seqlens``
    input_ids: torch.Tensor  #: int64 (L,), IMAGE_TOKEN_INDEX once per visual token
    #: int64 (L,), not shifted; IGNORE_INDEX at tokens without a label and at each dialogue's first token
    labels: torch.Tensor
    position_ids: torch.Tensor  #: int64 (L,), restarts at 0 with each dialogue
    cu_seqlens: torch.Tensor  #: int32 (D + 1,), offsets at which dialogues start and end; (0, 1) in an empty row
    lengths: list[int]  #: tokens of each dialogue, the differences of ``cu_seqlens``; [1] in an empty row
    image_positions: torch.Tensor  #: int64 (V,), positions in ``input_ids`` of IMAGE_TOKEN_INDEX, ascending
    label_positions: torch.Tensor  #: int64 (K,), positions whose next token has a label, ascending
    token_weight: torch.Tensor  #: float32 (L,), loss weight of each labeled token, 0 elsewhere
    total_weight: float  #: planned weight of the global batch over all rows, unreadable dialogues included
    clips: torch.Tensor  #: uint8 (N_c, 4, S, S, 3)
    image_tiles: torch.Tensor  #: uint8 (N_s, S, S, 3)
    #: int64 (V,), for each of ``image_positions`` its row in concat(clip tokens, image tokens)
    visual_index: torch.Tensor
    #: float32 (U, n), random numbers of each clip and image tile (trainer/training/drop_path_rng.py)
    drop_path_rand: torch.Tensor | None = None
    #: (N_c + N_s, 64, C), merged tokens of the vision tower in place of ``clips`` and ``image_tiles``, which are empty
    unit_tokens: torch.Tensor | None = None
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)  #: (dialogue key, reason) left out

    @property
    def tokens(self) -> int:
        """Tokens of the row, visual ones included; 0 for a row without dialogues."""
        return len(self.input_ids) if self.keys else 0

    @property
    def frames(self) -> int:
        """Images that go through the vision tower: frames of clips and tiles of images."""
        return self.clips.shape[0] * self.clips.shape[1] + self.image_tiles.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(value.nbytes for value in self.tensors().values())

    def to(self, device: Any, non_blocking: bool = True) -> Batch:
        """Return a copy with every tensor on ``device``."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return a copy with every tensor in page-locked memory, for asynchronous copies to a GPU."""
        return self._mapped(lambda tensor: tensor.pin_memory())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors by their names."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        changes: dict[str, Any] = {name: function(value) for name, value in self.tensors().items()}
        return dataclasses.replace(self, **changes)


def image_and_label_positions(input_ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find ``image_positions`` and ``label_positions`` of a row on the CPU.

    Args:
        input_ids: int64 (L,).
        labels: int64 (L,), not shifted. Position i predicts label i + 1.

    Returns:
        int64 (V,) and (K,), ascending.
    """
    labeled = labels[1:] != IGNORE_INDEX
    return (input_ids == IMAGE_TOKEN_INDEX).nonzero().squeeze(1), labeled.nonzero().squeeze(1)
