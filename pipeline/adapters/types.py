"""Types that the adapters return: media with their frames and timestamps, and the dialogues about them.

They are named tuples of tensors and plain values, so that a DataLoader can move them between processes and pin them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch.utils.data._utils.collate import default_collate_fn_map


class SampleError(ValueError):
    """A sample cannot be read; one line that names the shard and the member."""


class Media(NamedTuple):
    """One media item: a video (or a clip of one) or an image."""

    frames: torch.Tensor  #: uint8 (T, H, W, 3), RGB; an image has T = 1
    timestamps: torch.Tensor  #: float64 (T,), seconds of each frame in its source
    key: str
    kind: str  #: video or image
    start: float  #: seconds of the source at which the clip begins
    duration: float  #: seconds of the clip; 0 for an image
    source: str  #: root and path of the source file


class Dialogue(NamedTuple):
    """One dialogue."""

    #: {"from": human, gpt or system, "value": text}; the n-th <image> mark is the n-th media item, videos too
    turns: list[dict[str, str]]
    key: str
    id: str  #: as the annotation says
    entry: str  #: name of the manifest's entry


class Sample(NamedTuple):
    """A dialogue with its media in order of use, or a media item with the dialogues about it alone."""

    media: list[Media]
    dialogues: list[Dialogue]


class StreamBatch(NamedTuple):
    """The samples of one rank in one step."""

    samples: list[Sample]
    skipped: list[tuple[str, str]]  #: (key, reason) of samples that could not be read
    state: dict[str, Any]  #: position after this batch, the same on all ranks; see :meth:`ShardStream.load_state_dict`


def _list_samples(samples: Sequence[Sample], *, collate_fn_map: Any = None) -> list[Sample]:
    """Collate samples for a DataLoader without a ``collate_fn``: media differ in size, so a batch is a list."""
    return list(samples)


def _refuse_batches(batches: Sequence[StreamBatch], *, collate_fn_map: Any = None) -> NoReturn:
    raise ValueError("a ShardStream returns batches already; pass batch_size=None to its DataLoader")


default_collate_fn_map[Sample] = _list_samples
default_collate_fn_map[StreamBatch] = _refuse_batches
