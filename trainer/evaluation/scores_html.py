"""Render scores as HTML, on a page of their own or in a report of runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from framestream.pipeline.html.page import render_page
from framestream.pipeline.html.svg import COLORS, Bar, bar_chart
from framestream.trainer.evaluation.metrics import IOU_THRESHOLDS, format_points, is_correct, is_good_iou

#: color of the bars by condition: own frames, those of another question, own frames in another order
BAR_COLORS = {"own": COLORS[0], "blind": "#b9c0cc", "shuffled": "#e0b36a"}
#: of the templates: a number with one decimal, an interval of a row, and whether an example is answered correctly
SCORE_FILTERS: dict[str, Callable[..., Any]] = {
    "points": format_points,
    "interval": lambda row, name: _interval(row, name),
    "right": lambda example: _is_right(example),
}


def scores_values(result: dict) -> dict[str, Any]:
    """Return what the templates show of the object of evaluation.json."""
    rows, grounding = result["families"], result.get("grounding", [])
    groups = [(row["family"], _bars(row, "accuracy")) for row in rows if row["method"] == "generation"]
    chart = bar_chart("accuracy by question family", groups) if groups or not grounding else ""
    if grounding:
        chart += bar_chart("mIoU by question family", [(row["family"], _bars(row, "miou")) for row in grounding])
    alone = sorted({row["family"] for row in (*rows, *grounding) if row["blind"] is None})
    scores = {**result, "grounding": grounding, "without_blind": alone}
    return {"scores": scores, "chart": chart, "thresholds": IOU_THRESHOLDS}


def _bars(row: Mapping[str, Any], name: str) -> list[Bar]:
    """Return the bars of one row: the score ``name`` with the question's own frames, and the controls."""
    bars = [Bar(row[name], row["low"], row["high"], BAR_COLORS["own"], "own frames")]
    for control in ("blind", "shuffled"):
        if row[control] is None:
            continue
        low, high = row[f"{control}_low"], row[f"{control}_high"]
        bars.append(Bar(row[control], low, high, BAR_COLORS[control], control))
    return bars


def _interval(row: Mapping[str, Any], name: str) -> str:
    """Format the interval of a control or its gain; empty for a control that was not asked."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "" if low is None else f"{low:.1f} to {high:.1f}"


def _is_right(example: Mapping[str, Any]) -> bool:
    """Return whether an example is answered correctly; an interval by its IoU."""
    if "iou" in example:
        return is_good_iou(example["iou"])
    return is_correct(example["given"], example["expected"])


def render_scores_page(result: dict) -> str:
    """Render a page about one result."""
    template = Path(__file__).parent / "evaluation.html.j2"
    return render_page(template, SCORE_FILTERS, **scores_values(result), **BAR_COLORS)
