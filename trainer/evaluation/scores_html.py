"""Scores as HTML: by themselves, and what reports of runs show of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framestream.pipeline.html.page import render_page
from framestream.pipeline.html.svg import COLORS, Bar, bar_chart
from framestream.trainer.evaluation.metrics import is_correct

#: colours of the bars: with a question's own frames, with another's, with its own in another order
BAR_COLORS = {"own": COLORS[0], "blind": "#b9c0cc", "shuffled": "#e0b36a"}
SCORE_FILTERS = {"points": "{:.1f}".format, "right": lambda example: is_correct(example["given"], example["expected"])}


def scores_values(result: dict) -> dict[str, Any]:
    """What the templates show of a result of :func:`framestream.trainer.evaluation.scorer.evaluate`."""
    groups = []
    for row in result["families"]:
        if row["method"] != "generation":
            continue
        bars = [Bar(row["accuracy"], row["low"], row["high"], BAR_COLORS["own"], "own frames")]
        for name in ("blind", "shuffled"):
            bars.append(Bar(row[name], row[f"{name}_low"], row[f"{name}_high"], BAR_COLORS[name], name))
        groups.append((row["family"], bars))
    return {"scores": result, "chart": bar_chart("accuracy by question family", groups)}


def render_scores_page(result: dict) -> str:
    """A page about one result."""
    return render_page(Path(__file__).parent / "evaluation.html.j2", SCORE_FILTERS, **scores_values(result), **BAR_COLORS)
