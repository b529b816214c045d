"""Score needles in haystacks: by number of frames and depth or by chain, with the time and memory of each number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.haystack import Haystack
from framestream.trainer.evaluation.metrics import is_correct, summarize
from framestream.trainer.evaluation.rank_pool import RankPool
from framestream.trainer.evaluation.scorer import evaluate


def run_haystack(
    manifest: Manifest,
    checkpoint: Path,
    haystack: Haystack,
    ranks: RankPool | None = None,
    limit: int | None = None,
) -> dict | None:
    """Ask every question of ``haystack``, with its needles and blind. ``ranks`` share the questions.

    Args:
        limit: questions of each cell that are asked, all if None.

    Returns:
        None on other ranks than rank 0. On rank 0 it is the object of haystack.json: that of
        :func:`framestream.trainer.evaluation.scorer.evaluate`, with ``frames`` and ``depth`` in each row of
        ``families``, and

        ``trained_frames``: the most frames that the model was trained with.
        ``max_frames``: the largest number of frames.
        ``trained``: the accuracy at the largest number of frames that is not above ``trained_frames``.
        ``deepest``: the same for the deepest needles alone. Both are None if all numbers of frames are above it.
        ``chains``: for chains, a row for each number of frames. ``families`` is then empty.
        ``costs``: seconds and peak memory in bytes of the prompts, a row for each number of frames.
    """
    result = evaluate(manifest, checkpoint, haystack, limit, ("blind",), examples=0, ranks=ranks, needs_blind=True)
    if result is None:
        return None
    cells = haystack.cells
    rows = [{**row, **cells[row["family"]]._asdict()} for row in result["families"]]
    result["families"] = [row for row in rows if row["depth"] is not None]
    needles = [cell for cell in cells.values() if cell.depth is not None]
    trained = max((cell.frames for cell in needles if cell.frames <= result["trained_frames"]), default=None)
    depth = max((cell.depth for cell in needles if cell.depth is not None), default=0.0)
    within = [row for row in result["answers"] if needles and cells[row["family"]].frames == trained]
    deepest = [row for row in within if cells[row["family"]].depth == depth]
    result["max_frames"] = max(cell.frames for cell in cells.values())
    result["trained"] = _summarize_cells(within, f"{trained} frames", manifest.seed)
    result["deepest"] = _summarize_cells(deepest, f"{trained} frames, {depth:g} % deep", manifest.seed)
    result["chains"] = [] if needles else _summarize_chains(haystack, result["answers"], manifest.seed)
    result["costs"] = [
        {"family": f"{frames} frames", "method": "prompts", "frames": int(frames), **cost}
        for frames, cost in sorted(result.get("costs", {}).items(), key=lambda item: int(item[0]))
    ]
    return result


def _summarize_cells(rows: list[dict], name: str, seed: int) -> dict | None:
    """Summarize the generated answers of several cells; None if there are no answers."""
    if not rows:
        return None
    own, blind = (
        np.array([is_correct(row[condition], row["expected"]) for row in rows]) for condition in ("own", "blind")
    )
    return summarize(name, "generation", own, {"blind": blind}, seed)


def _summarize_chains(haystack: Haystack, answers: list[dict], seed: int) -> list[dict]:
    """Summarize the answers to questions about chains, as the published evaluation does.

    Returns:
        for each number of frames the accuracy over all questions, ``kinds`` (that of each family of the annotations),
        ``chains`` and ``all_correct``: how many chains were asked about, and all questions of how many are correct.
    """
    rows = []
    for name, cell in haystack.cells.items():
        asked = [row for row in answers if row["family"] == name]
        row = _summarize_cells(asked, name, seed)
        if row is None:
            continue
        kinds: dict[str, list[bool]] = {}
        chains: dict[str, list[bool]] = {}
        for answer in asked:
            origin, correct = haystack.origins[answer["key"]], is_correct(answer["own"], answer["expected"])
            kinds.setdefault(origin.kind, []).append(correct)
            chains.setdefault(origin.chain, []).append(correct)
        rows.append(
            row
            | {
                "frames": cell.frames,
                "kinds": {kind: 100 * float(np.mean(found)) for kind, found in sorted(kinds.items())},
                "chains": len(chains),
                "all_correct": sum(map(all, chains.values())),
            }
        )
    return rows
