"""Score needles in haystacks, and the accuracy at the lengths that the model was trained with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.haystack import Haystack
from framestream.trainer.evaluation.metrics import is_correct, summarize
from framestream.trainer.evaluation.rank_pool import RankPool
from framestream.trainer.evaluation.scorer import evaluate


def run_haystack(
    manifest: Manifest, checkpoint: Path, haystack: Haystack, ranks: RankPool | None = None
) -> dict | None:
    """Ask every question of ``haystack``, with its needle and blind. ``ranks`` share the questions.

    Returns:
        None on other ranks than rank 0. On rank 0 it is the object of haystack.json: that of
        :func:`framestream.trainer.evaluation.scorer.evaluate`, with ``frames`` and ``depth`` in each row of
        ``families``, and

        ``trained_frames``: the manifest's most frames.
        ``trained``: the accuracy at the largest number of frames that is not above ``trained_frames``.
        ``deepest``: the same for the deepest needles alone. Both are None if all numbers of frames are above it.
    """
    result = evaluate(manifest, checkpoint, haystack, controls=("blind",), examples=0, ranks=ranks)
    if result is None:
        return None
    for row in result["families"]:
        row |= haystack.cells[row["family"]]._asdict()
    trained = max((cell.frames for cell in haystack.cells.values() if cell.frames <= manifest.frames.max), default=None)
    depth = max(cell.depth for cell in haystack.cells.values())
    within = [row for row in result["answers"] if haystack.cells[row["family"]].frames == trained]
    deepest = [row for row in within if haystack.cells[row["family"]].depth == depth]
    result["trained_frames"] = manifest.frames.max
    result["trained"] = _summarize_cells(within, f"{trained} frames", manifest.seed)
    result["deepest"] = _summarize_cells(deepest, f"{trained} frames, {depth:g} % deep", manifest.seed)
    return result


def _summarize_cells(rows: list[dict], name: str, seed: int) -> dict | None:
    """Summarize the generated answers of several cells; None if there are no answers."""
    if not rows:
        return None
    own, blind = (
        np.array([is_correct(row[condition], row["expected"]) for row in rows]) for condition in ("own", "blind")
    )
    return summarize(name, "generation", own, {"blind": blind}, seed)
