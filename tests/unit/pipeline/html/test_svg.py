"""Charts, read back with an XML parser."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.html.svg import (
    Bar,
    Bin,
    Line,
    bar_chart,
    downsample,
    format_duration,
    format_number,
    histogram,
    line_chart,
    ticks,
)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_even_and_cover_the_range(low, span):
    found = ticks(low, low + span)
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert 2 <= len(found) <= 8 and max(steps) - min(steps) <= 1e-6 * max(map(abs, [*found, 1.0]))
    assert found[0] <= low + 1e-6 * span + 1e-9 * abs(low) and found[-1] >= low + span - 1e-6 * span - 1e-9 * abs(low)


@given(st.lists(st.floats(-1e5, 1e5), min_size=1, max_size=2000))
def test_charts_are_well_formed_and_stay_inside(values):
    svg = line_chart("a < b", [Line("x & y", range(1, len(values) + 1), values)])
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    for line in root.iter("polyline"):
        places = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(places) == min(len(values), 500)
        assert all(0 <= x <= width and 0 <= y <= height for x, y in places)


def test_bars_are_as_long_as_their_values():
    bars = [Bar(50.0, 40.0, 60.0, "#000", "own"), Bar(25.0, 20.0, 30.0, "#111", "blind")]
    root = ElementTree.fromstring(bar_chart("t", [("family", bars)]))
    lengths = [float(rect.get("width")) for rect in root.iter("rect")]
    assert lengths[0] == pytest.approx(2 * lengths[1], abs=0.2)


def test_numbers_in_few_characters():
    assert [format_number(v) for v in (0, 0.25, 12, 3400, 1e-3, 2.5e-4, 1.2e9)] == [
        "0",
        "0.25",
        "12",
        "3.4k",
        "1e-3",
        "2.5e-4",
        "1.2G",
    ]
    assert [format_duration(s) for s in (3.21, 245, 7380, 4e6)] == [
        "3.2 s",
        "4 min 05 s",
        "2 h 03 min",
        "1,111 h 06 min",
    ]
    assert downsample([1.0, 3.0, 5.0, 7.0], 2) == [2.0, 6.0]


@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=40))
def test_bars_of_a_histogram_are_as_high_as_their_counts(counts):
    bins = [Bin(float(number), number + 1.0, count) for number, count in enumerate(counts)]
    root = ElementTree.fromstring(histogram("a < b", bins))
    width, height = map(float, root.get("viewBox").split()[2:])
    bars = list(root.iter("rect"))
    heights = [float(bar.get("height")) for bar in bars]
    assert len(bars) == len(counts) and root.get("aria-label") == "a < b"
    assert heights == pytest.approx([count / max(*counts, 1) * max(heights) for count in counts], abs=0.2)
    assert all(float(bar.get("x")) >= 0 and float(bar.get("x")) + float(bar.get("width")) <= width for bar in bars)
    assert all(float(bar.get("y")) + float(bar.get("height")) <= height for bar in bars)
    assert bars[0][0].text == f"0 to 1: {counts[0]:,}"
