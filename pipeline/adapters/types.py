"""What the adapters give: media with their frames and seconds, and the dialogues about them.

These are named tuples of tensors and plain values, so that a DataLoader moves them between processes and pins them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class SampleError(ValueError):
    """A sample that cannot be read: one line that names the shard and the member."""


class Media(NamedTuple):
    """One video or still."""

    frames: torch.Tensor  #: uint8 (T, H, W, 3), RGB; a still has T = 1
    timestamps: torch.Tensor  #: float64 (T,), the second of each frame in its source
    key: str
    kind: str  #: video or image
    start: float  #: second of the source at which the clip begins
    duration: float  #: seconds of the clip; 0 for a still
    source: str


class Dialogue(NamedTuple):
    """One conversation."""

    turns: list[dict[str, str]]  #: {"from": human, gpt or system, "value": text}; the n-th <image> is the n-th medium
    key: str
    id: str  #: as the annotation says
    entry: str  #: name of the manifest's entry


class Sample(NamedTuple):
    """A dialogue with its media, or a medium with the dialogues about it alone."""

    media: list[Media]
    dialogues: list[Dialogue]
