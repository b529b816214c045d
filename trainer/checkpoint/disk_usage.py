"""What a run writes to the disk, from the manifest alone, and whether there is room for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.model.cost import parameters
from framestream.trainer.model.parts import PARTS

GB = 1e9
BYTES = {"bf16": 2, "fp32": 4}


def checkpoint_bytes(manifest: Manifest) -> int:
    """Bytes of one checkpoint: weights and AdamW's two moments of what is trained, in float32.

    Below ZeRO-3 DeepSpeed adds the weights once more as the model has them. Frozen parts are not in it.
    """
    train, counts = manifest.train, parameters(manifest)
    trained = sum(counts[name] for name in PARTS if getattr(train, name).train)
    return trained * (12 + (BYTES[train.dtype] if train.zero_stage < 3 else 0))


def final_bytes(manifest: Manifest) -> int:
    """Bytes of the final weights, all parts."""
    return sum(parameters(manifest).values()) * BYTES[manifest.train.dtype]


def conversion_bytes(manifest: Manifest, world: int) -> int:
    """Bytes, for a while, of a checkpoint of ``world`` ranks that another number goes on from: DeepSpeed cuts it into
    one file for each parameter and rank, joins these, and copies the first rank's part."""
    return checkpoint_bytes(manifest) * (2 * world + 1) // world


def describe_disk(manifest: Manifest) -> str:
    """What a run writes, in one line."""
    one, kept = checkpoint_bytes(manifest) / GB, manifest.train.keep_last
    return (
        f"{one:,.3g} GB a checkpoint, at most {kept + 1} at once (train.keep_last: {kept}), "
        f"{final_bytes(manifest) / GB:,.3g} GB final weights"
    )


def check_disk(manifest: Manifest) -> str:
    """Why the disk of ``output`` is too small for the whole run, or an empty text; what lies there counts as free."""
    run = Path(manifest.output)
    needed = checkpoint_bytes(manifest) * (manifest.train.keep_last + 1) + final_bytes(manifest)
    there = sum(path.stat().st_size for name in ("checkpoints", "final.part") for path in _files(run / name))
    return _short(run, needed - there, "lower train.keep_last")


def check_free(folder: Path, needed: int) -> str:
    """Why ``needed`` bytes do not fit on the disk of ``folder``, or an empty text."""
    return _short(folder, needed, "make room, and repeat the command")


def _short(folder: Path, needed: int, fix: str) -> str:
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed <= free:
        return ""
    return f"{folder}: {needed / GB:,.3g} GB are needed, {free / GB:,.3g} GB are free; {fix} or choose another output"


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
