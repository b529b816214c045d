"""Damage a shard root, and compare batches."""

from __future__ import annotations

from pathlib import Path

import torch

from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.index import Index


def same(a: Batch, b: Batch) -> bool:
    def plain(batch):
        return {
            name: value.tolist() if isinstance(value, torch.Tensor) else value
            for name in Batch.__dataclass_fields__
            for value in [getattr(batch, name)]
        }

    return plain(a) == plain(b)


def spoil(folder: Path, media: dict) -> None:
    """Overwrite the header of the medium's last frame."""
    index = Index.open(folder / "stage2")
    row = index.media["key"].to_pylist().index(media["key"])
    with open(index.shard_path(index.media["shard"][row].as_py()), "r+b") as file:
        file.seek(index.media["frame_offset"][row].as_py()[-1])
        file.write(bytes(40))
