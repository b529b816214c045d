"""Render scores as HTML, on a page of their own or in a report of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from framestream.pipeline.html.page import render_page
from framestream.pipeline.html.svg import COLORS, Bar, bar_chart
from framestream.trainer.evaluation.metrics import is_correct

#: color of the bars by condition: own frames, those of another question, own frames in another order
BAR_COLORS = {"own": COLORS[0], "blind": "#b9c0cc", "shuffled": "#e0b36a"}
#: of the templates: a number with one decimal, and whether an example is answered correctly
SCORE_FILTERS: dict[str, Callable[..., Any]] = {
    "points": "{:.1f}".format,
    "right": lambda example: is_correct(example["given"], example["expected"]),
}


def scores_values(result: dict) -> dict[str, Any]:
    """Return what the templates show of the object of evaluation.json."""
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
    """Render a page about one result."""
    template = Path(__file__).parent / "evaluation.html.j2"
    return render_page(template, SCORE_FILTERS, **scores_values(result), **BAR_COLORS)
