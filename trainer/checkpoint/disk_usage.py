"""Compute from the manifest what a run writes to disk, and check the free space."""

from __future__ import annotations

import shutil
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.model.cost import count_parameters, count_trained
from framestream.trainer.model.lora import adapted_parts

GB = 1e9
BYTES = {"bf16": 2, "fp32": 4}


def checkpoint_bytes(manifest: Manifest) -> int:
    """Return the bytes of one checkpoint: weights and AdamW's two moments of the trained parts, in float32.

    Below ZeRO-3 DeepSpeed also stores the weights in the model's dtype. Frozen parts are not stored.
    """
    train, trained = manifest.train, sum(count_trained(manifest).values())
    return trained * (12 + (BYTES[train.dtype] if train.zero_stage < 3 else 0))


def final_bytes(manifest: Manifest) -> int:
    """Return the bytes of the final weights: of all parts, or with adapters of what is trained."""
    counts = count_trained(manifest) if adapted_parts(manifest.train) else count_parameters(manifest)
    return sum(counts.values()) * BYTES[manifest.train.dtype]


def conversion_bytes(manifest: Manifest, world: int) -> int:
    """Return the temporary bytes to convert a checkpoint of ``world`` ranks to another number of ranks.

    DeepSpeed splits it into one file for each parameter and rank, joins these, and copies the first rank's part.
    """
    return checkpoint_bytes(manifest) * (2 * world + 1) // world


def max_checkpoints(manifest: Manifest) -> int:
    """Return how many checkpoints exist at once: those kept, the best of the validations, and one being written."""
    return manifest.train.keep_last + bool(manifest.evaluate.every) + 1


def describe_disk(manifest: Manifest) -> str:
    """Describe in one line what a run writes."""
    size, most = checkpoint_bytes(manifest) / GB, max_checkpoints(manifest)
    kept = f"train.keep_last: {manifest.train.keep_last}" + ", and the best" * bool(manifest.evaluate.every)
    return (
        f"{size:,.3g} GB a checkpoint, at most {most} at once ({kept}), "
        f"{final_bytes(manifest) / GB:,.3g} GB final weights"
    )


def check_disk(manifest: Manifest) -> str:
    """Return an error if the disk of ``output`` is too small for the run, else an empty text.

    Checkpoints that already exist count as free, because they are replaced.
    """
    run = Path(manifest.output)
    needed = checkpoint_bytes(manifest) * max_checkpoints(manifest) + final_bytes(manifest)
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
