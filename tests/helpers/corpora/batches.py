"""All batches of a loader as comparable values."""

from __future__ import annotations

from framestream.pipeline import build_loader
from framestream.pipeline.loading.batch import Batch


def contents(batch: Batch) -> dict:
    """Return all contents of a row as comparable values."""
    values = {name: getattr(batch, name) for name in Batch.__dataclass_fields__}
    return {name: value.numpy().tobytes() if hasattr(value, "numpy") else value for name, value in values.items()}


def batches(made) -> list[dict]:
    return [contents(batch) for batch in build_loader(made)]
