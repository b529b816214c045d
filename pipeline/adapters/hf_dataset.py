"""A shard root as a data set of Hugging Face, for trainers that take nothing else, such as those of TRL.

The rows are numbers until they are read. Then each becomes ``{"sample": Sample}``, which
:class:`framestream.pipeline.adapters.ChatCollator` takes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from framestream.pipeline.adapters.dataset import ShardDataset
from framestream.pipeline.adapters.frame_selection import FrameChoice
from framestream.pipeline.adapters.types import Sample
from framestream.pipeline.utils.arguments import refuse_unknown_arguments

SHARDS = 64  #: parts of an ``IterableDataset``, for as many workers and ranks at most


@refuse_unknown_arguments
def as_hf_dataset(
    root: str | os.PathLike,
    *,
    by: str = "dialogue",
    frames: FrameChoice = None,
    split: str = "train",
    streaming: bool = False,
) -> Any:
    """Return a ``datasets.Dataset`` of the samples of one split, or an ``IterableDataset`` with ``streaming``.

    Args:
        root: as for :class:`framestream.pipeline.adapters.ShardDataset`, like the next three.
        by: samples of one dialogue, or of one media item.
        frames: which frames of each video.
        split: ``train`` or ``val``.
        streaming: return an ``IterableDataset`` in the order of the index, which may be shuffled and split by node.

    Raises:
        ImportError: the package datasets is not installed.
        ShardsError, ValueError: as for :class:`framestream.pipeline.adapters.ShardDataset`.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"as_hf_dataset: {error}; pip install datasets") from None
    dataset = ShardDataset(root, by=by, frames=frames, split=split)
    read = _Read(dataset)
    numbers = datasets.Dataset.from_dict({"number": list(range(len(dataset)))})
    if not streaming:
        return numbers.with_transform(read)
    shards = min(SHARDS, len(dataset))
    return numbers.to_iterable_dataset(shards).map(read, batched=True, batch_size=1, remove_columns=["number"])


@dataclass(frozen=True, slots=True)
class _Read:
    """Reads the samples of rows when they are requested."""

    dataset: ShardDataset

    def __call__(self, rows: dict[str, list[int]]) -> dict[str, list[Sample]]:
        return {"sample": [self.dataset[number] for number in rows["number"]]}
