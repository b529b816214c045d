"""TODO."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.haystack import Haystack
from framestream.trainer.evaluation.metrics import is_correct, summarize
from framestream.trainer.evaluation.scorer import evaluate


def run_haystack(manifest: Manifest, checkpoint: Path, haystack: Haystack) -> dict:
    """Ask everything; returns what haystack.json holds.

    Returns:
        what :func:`framestream.trainer.evaluation.scorer.evaluate` does, each of ``families`` with its ``frames`` and ``depth``;
        ``trained_frames``, the manifest's most; ``trained``, the accuracy at the most frames that are no more than
        these, ``deepest`` the same of the deepest needles among them; None where more are asked only.
    """
    result = evaluate(manifest, checkpoint, haystack, controls=("blind",), examples=0)
    for row in result["families"]:
        row |= haystack.cells[row["family"]]._asdict()
    most = max((cell.frames for cell in haystack.cells.values() if cell.frames <= manifest.frames.max), default=None)
    depth = max(cell.depth for cell in haystack.cells.values())
    within = [row for row in result["answers"] if haystack.cells[row["family"]].frames == most]
    deepest = [row for row in within if haystack.cells[row["family"]].depth == depth]
    result["trained_frames"] = manifest.frames.max
    result["trained"] = _together(within, f"{most} frames", manifest.seed)
    result["deepest"] = _together(deepest, f"{most} frames, {depth:g} % deep", manifest.seed)
    return result


def _together(rows: list[dict], name: str, seed: int) -> dict | None:
    """The accuracy of several cells' answers."""
    if not rows:
        return None
    own, blind = (np.array([is_correct(row[way], row["expected"]) for row in rows]) for way in ("own", "blind"))
    return summarize(name, "generation", own, {"blind": blind}, seed)
