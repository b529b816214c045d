"""Render heat maps of needles in haystacks as HTML, on a page of their own or in a report of runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from framestream.pipeline.html.page import render_page
from framestream.pipeline.html.svg import heat_map
from framestream.trainer.evaluation.scores_html import SCORE_FILTERS


def haystack_values(result: dict) -> dict[str, Any]:
    """Return what the templates show of the object of haystack.json."""
    rows = [row for row in result["families"] if row["method"] == "generation"]
    result = {"chains": [], "costs": [], **result}
    if not rows:
        return {"haystack": result, "maps": []}
    frames, depths = (sorted({row[name] for row in rows}) for name in ("frames", "depth"))
    columns, lines = [f"{count:,}" for count in frames], [f"{depth:g} %" for depth in depths]
    maps = []
    for value, title in (("accuracy", "accuracy, %"), ("blind", "blind, %")):
        values = {(row["frames"], row["depth"]): row[value] for row in rows}
        cells = [[values.get((count, depth)) for count in frames] for depth in depths]
        maps.append(heat_map(title, columns, lines, cells, "frames", "depth"))
    return {"haystack": result, "maps": maps}


def render_haystack_page(result: dict) -> str:
    """Render a page about one result."""
    return render_page(Path(__file__).parent / "search.html.j2", SCORE_FILTERS, **haystack_values(result))
