"""Draw small SVG charts for HTML pages without a chart library: lines, bars with intervals, histograms, heat maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLORS = ("#2f6fdb", "#d9730d", "#2b8a5b", "#8a4fbf")
MAX_POINTS = 500  #: of one line; longer ones are reduced to means


@dataclass(frozen=True, slots=True)
class Line:
    """One line: a name for the legend (or empty), x and y of equal length, a color, and whether it is background."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = COLORS[0]
    faint: bool = False


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a group: a value between 0 and 100 with its interval."""

    value: float
    low: float
    high: float
    color: str
    label: str


@dataclass(frozen=True, slots=True)
class Bin:
    """The number of values from ``low`` up to ``high``; if these are equal, of that value only."""

    low: float
    high: float
    count: int

    @property
    def label(self) -> str:
        """The range as text."""
        return f"{self.low:,.6g}" if self.low == self.high else f"{self.low:,.6g} to {self.high:,.6g}"


def format_number(value: float) -> str:
    """Format a number in few characters: 0, 0.25, 12, 3.4k, 1e-5."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-2:
        return f"{value:.1e}".replace("e-0", "e-").replace(".0e", "e")
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{value / unit:.3g}{name}"
    return f"{value:.3g}"


def format_duration(seconds: float) -> str:
    """Format seconds as ``3.2 s``, ``4 min 05 s`` or ``2 h 03 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about ``count`` round numbers that cover ``low``..``high``; the outer ones are at or beyond the ends."""
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-3):
        high = low + (abs(low) if abs(low) > 1e-9 else 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def downsample(values: Sequence[float], limit: int = MAX_POINTS) -> list[float]:
    """Reduce to at most ``limit`` values, each the mean of consecutive ``values``."""
    if len(values) <= limit:
        return list(values)
    edges = [len(values) * i // limit for i in range(limit + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]


def line_chart(
    title: str,
    lines: Sequence[Line],
    width: int = 430,
    height: int = 210,
    low: float | None = None,
    show: Callable[[float], str] = format_number,
) -> Markup:
    """Draw lines over optimizer steps as an SVG element.

    Args:
        title: what the chart shows, with its unit; also its accessible name.
        lines: drawn in order; at least one must have points.
        low: where the y axis starts, the smallest value if None.
        show: how y ticks are written.
    """
    left, right, top, bottom = 52, 12, 30, 26
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if math.isfinite(y)]
    x_ticks = [t for t in ticks(0, max(xs), 5) if t <= max(xs)]
    y_ticks = ticks(min(ys) if low is None else low, max(ys))
    x0, x1, y0, y1 = 0, max(xs), y_ticks[0], y_ticks[-1]

    def across(x: float) -> float:
        return left + (x - x0) / (x1 - x0 or 1) * (width - left - right)

    def up(y: float) -> float:
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{up(y) + 3.5:.1f}" text-anchor="end">{show(y)}</text>')
    for x in x_ticks:
        parts.append(
            f'<text class="tick" x="{across(x):.1f}" y="{height - 8}" text-anchor="middle">{format_number(x)}</text>'
        )
    for line in lines:
        points = [
            f"{across(x):.1f},{up(y):.1f}"
            for x, y in zip(downsample(line.x), downsample(line.y), strict=True)
            if math.isfinite(y)
        ]
        style = "faint" if line.faint else "line"
        parts.append(f'<polyline class="{style}" stroke="{line.color}" points="{" ".join(points)}"/>')
    x = width - right  # right end of the legend, drawn from right to left
    for line in reversed([line for line in lines if line.name]):
        x -= 6.2 * len(line.name)
        parts.append(f'<text class="tick" x="{x:.0f}" y="16">{escape(line.name)}</text>')
        parts.append(f'<rect x="{x - 13:.0f}" y="9.5" width="9" height="3" rx="1" fill="{line.color}"/>')
        x -= 24
    return _svg(title, width, height, parts)


def bar_chart(title: str, groups: Sequence[tuple[str, Sequence[Bar]]], width: int = 900) -> Markup:
    """Draw horizontal bars from 0 to 100 with their intervals, in named groups, as an SVG element."""
    left, right, top, thick, gap = 150, 64, 10, 13, 14
    height = top + sum(len(bars) * (thick + 3) + gap for _, bars in groups) + 22

    def across(value: float) -> float:
        return left + value / 100 * (width - left - right)

    parts, y = [], float(top)
    for value in range(0, 101, 20):
        parts.append(
            f'<line class="grid" x1="{across(value):.1f}" x2="{across(value):.1f}" y1="{top - 4}" y2="{height - 20}"/>'
        )
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{height - 6}" text-anchor="middle">{value} %</text>'
        )
    for name, bars in groups:
        middle = y + len(bars) * (thick + 3) / 2
        parts.append(
            f'<text class="group" x="{left - 10}" y="{middle + 3:.1f}" text-anchor="end">{escape(name)}</text>'
        )
        for bar in bars:
            center = y + thick / 2
            label = escape(f"{name}, {bar.label}: {bar.value:.1f} % ({bar.low:.1f} to {bar.high:.1f})")
            parts.append(
                f'<rect x="{left}" y="{y:.1f}" width="{across(bar.value) - left:.1f}" height="{thick}" rx="2" '
                f'fill="{bar.color}"><title>{label}</title></rect>'
            )
            whisker = f"M{across(bar.low):.1f} {center:.1f}H{across(bar.high):.1f}"
            for end in (bar.low, bar.high):
                whisker += f"M{across(end):.1f} {center - 3.5:.1f}v7"
            parts.append(f'<path class="whisker" d="{whisker}"/>')
            at = max(across(bar.high), across(bar.value)) + 6
            parts.append(f'<text class="tick" x="{at:.1f}" y="{center + 3.5:.1f}">{bar.value:.1f}</text>')
            y += thick + 3
        y += gap
    return _svg(title, width, height, parts)


def histogram(title: str, bins: Sequence[Bin], width: int = 430, height: int = 210) -> Markup:
    """Draw counts in adjacent bins, with equal width whatever their range, as an SVG element.

    Args:
        title: what is counted, with its unit; also the chart's accessible name.
        bins: in ascending order, at least one.
    """
    left, right, top, bottom = 52, 12, 30, 26
    y_ticks = [tick for tick in ticks(0, max(1, *(bin.count for bin in bins))) if tick == int(tick)]
    step = (width - left - right) / len(bins)

    def up(count: float) -> float:
        return height - bottom - count / y_ticks[-1] * (height - top - bottom)

    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>')
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{up(y) + 3.5:.1f}" text-anchor="end">{format_number(y)}</text>'
        )
    every = -(-len(bins) // 8)
    for number, bin in enumerate(bins):
        x = left + number * step
        label = escape(f"{bin.label}: {bin.count:,}")
        parts.append(
            f'<rect x="{x + 0.5:.1f}" y="{up(bin.count):.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{height - bottom - up(bin.count):.1f}" fill="{COLORS[0]}"><title>{label}</title></rect>'
        )
        if number % every == 0:
            middle = x + step / 2 if bin.low == bin.high else x
            low = format_number(bin.low)
            parts.append(f'<text class="tick" x="{middle:.1f}" y="{height - 8}" text-anchor="middle">{low}</text>')
    return _svg(title, width, height, parts)


def heat_map(
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    across: str,
    down: str,
    width: int = 430,
) -> Markup:
    """Draw percentages in a grid as an SVG element: red at 0, yellow at 50, green at 100, with the number in each cell.

    Args:
        values: one list for each of ``rows``, with a value for each of ``columns``; None leaves the cell empty.
        across, down: names of the two axes.
    """
    left, right, top, bottom, tall = 64, 12, 30, 40, 30
    height, wide = top + tall * len(rows) + bottom, (width - left - right) / len(columns)
    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    for number, (name, cells) in enumerate(zip(rows, values, strict=True)):
        y = top + tall * number
        parts.append(
            f'<text class="tick" x="{left - 6}" y="{y + tall / 2 + 4}" text-anchor="end">{escape(name)}</text>'
        )
        for column, (words, value) in enumerate(zip(columns, cells, strict=True)):
            if value is None:
                continue
            x = left + wide * column
            label = escape(f"{words} {across}, {down} {name}: {value:.1f} %")
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{wide - 1:.1f}" height="{tall - 1}" fill="{heat_color(value)}">'
                f"<title>{label}</title></rect>"
            )
            parts.append(f'<text x="{x + wide / 2:.1f}" y="{y + tall / 2 + 4}" text-anchor="middle">{value:.0f}</text>')
    y = top + tall * len(rows)
    for column, words in enumerate(columns):
        x = left + wide * (column + 0.5)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{y + 14}" text-anchor="middle">{escape(words)}</text>')
    middle = left + (width - left - right) / 2
    parts.append(f'<text class="tick" x="{middle:.1f}" y="{y + 30}" text-anchor="middle">{escape(across)}</text>')
    parts.append(f'<text class="tick" x="{left - 6}" y="{y + 30}" text-anchor="end">{escape(down)}</text>')
    return _svg(title, width, height, parts)


def heat_color(value: float) -> str:
    """Return the color of a percentage between 0 and 100."""
    stops = ((230, 107, 91), (247, 222, 131), (112, 190, 131))
    at = min(max(value, 0.0), 100.0) / 50
    first, second = stops[min(int(at), 1)], stops[min(int(at), 1) + 1]
    share = at - min(int(at), 1)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(first, second, strict=True))


def _svg(title: str, width: int, height: int, parts: list[str]) -> Markup:
    body = "".join(parts)
    name = escape(title)
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{name}">{body}</svg>')  # noqa: S704
