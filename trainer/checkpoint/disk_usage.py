"""Compute from the manifest what a run writes to disk, and check the free space."""

from __future__ import annotations

import shutil
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.model.cost import count_parameters
from framestream.trainer.model.parts import PARTS

GB = 1e9
BYTES = {"bf16": 2, "fp32": 4}


def checkpoint_bytes(manifest: Manifest) -> int:
    """Return the bytes of one checkpoint: weights and AdamW's two moments of the trained parts, in float32.

    Below ZeRO-3 DeepSpeed also stores the weights in the model's dtype. Frozen parts are not stored.
    """
    train, counts = manifest.train, count_parameters(manifest)
    trained = sum(counts[name] for name in PARTS if getattr(train, name).train)
    return trained * (12 + (BYTES[train.dtype] if train.zero_stage < 3 else 0))


def final_bytes(manifest: Manifest) -> int:
    """Return the bytes of the final weights of all parts."""
    return sum(count_parameters(manifest).values()) * BYTES[manifest.train.dtype]


def conversion_bytes(manifest: Manifest, world: int) -> int:
    """Return the temporary bytes to convert a checkpoint of ``world`` ranks to another number of ranks.

    DeepSpeed splits it into one file for each parameter and rank, joins these, and copies the first rank's part.
    """
    return checkpoint_bytes(manifest) * (2 * world + 1) // world


def describe_disk(manifest: Manifest) -> str:
    """Describe in one line what a run writes."""
    size, keep = checkpoint_bytes(manifest) / GB, manifest.train.keep_last
    return (
        f"{size:,.3g} GB a checkpoint, at most {keep + 1} at once (train.keep_last: {keep}), "
        f"{final_bytes(manifest) / GB:,.3g} GB final weights"
    )


def check_disk(manifest: Manifest) -> str:
    """Return an error if the disk of ``output`` is too small for the run, else an empty text.

    Checkpoints that already exist count as free, because they are replaced.
    """
    run = Path(manifest.output)
    needed = checkpoint_bytes(manifest) * (manifest.train.keep_last + 1) + final_bytes(manifest)
    existing = sum(path.stat().st_size for name in ("checkpoints", "final.part") for path in _files(run / name))
    return _short(run, needed - existing, "lower train.keep_last")


def check_free(folder: Path, needed: int) -> str:
    """Return an error if ``needed`` bytes do not fit on the disk of ``folder``, else an empty text."""
    return _short(folder, needed, "make room, and repeat the command")


def _short(folder: Path, needed: int, fix: str) -> str:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return ""
    return f"{folder}: {needed / GB:,.3g} GB are needed, {free / GB:,.3g} GB are free; {fix} or choose another output"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
