"""Images of a report: they are well-formed, and show the names and the example that they should."""

from __future__ import annotations

import base64
import io
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from framestream.pipeline.html.svg import Line, heat_map, line_chart
from framestream.trainer.evaluation.report_images import choose_example, standalone_svg, write_report_images

SVG = "{http://www.w3.org/2000/svg}"


def example(given: str, blind: str | None, frames: int) -> dict:
    stored = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 30, 30)).save(stored, "JPEG")
    jpeg = base64.b64encode(stored.getvalue()).decode("ascii")
    return {
        "question": "Which?",
        "expected": "red",
        "given": given,
        "blind_given": blind,
        "frames_jpeg": [jpeg] * frames,
    }


def test_what_there_is_to_show_is_written(tmp_path):
    charts = {f"<stage {i}>": line_chart("loss", [Line("", [1, 2, 3], [3.0, 2.0, 1.0])]) for i in (1, 2, 3)}
    assert [path.name for path in write_report_images(tmp_path / "a", charts)] == ["loss.svg"]
    maps = [heat_map(title, ["8"], ["0 %"], [[50.0]], "frames", "depth") for title in ("accuracy", "blind")]
    written = write_report_images(tmp_path / "b", charts, maps, [example("red", "blue", 10)])
    assert [path.name for path in written] == ["loss.svg", "haystack.svg", "answer.png"]
    loss = ElementTree.parse(written[0]).getroot()
    assert len(loss.findall(f"{SVG}svg")) == 3
    assert [text.text for text in loss.findall(f"{SVG}text")] == list(charts)
    with Image.open(written[2]) as image:
        assert image.format == "PNG" and image.width > 8 * 160


def test_charts_do_not_overlap_and_stay_inside():
    chart = line_chart("loss", [Line("", [1, 2], [1.0, 2.0])], width=100, height=50)
    root = ElementTree.fromstring(standalone_svg([chart] * 5, list("abcde")))
    boxes = [tuple(int(item.get(name)) for name in ("x", "y", "width", "height")) for item in root.findall(f"{SVG}svg")]
    assert len({(x, y) for x, y, *_ in boxes}) == 5
    for x, y, width, height in boxes:
        assert 0 <= x <= int(root.get("width")) - width and 0 <= y <= int(root.get("height")) - height
        assert not any(x < u < x + width or y < v < y + height for u, v, *_ in boxes)


@pytest.mark.parametrize("order", [1, -1])
def test_a_telling_example_is_chosen(order):
    wrong, blind_too, not_blind, short, long = (
        example("blue", "green", 16),
        example("red", "red", 16),
        example("red", None, 16),
        example("red", "blue", 4),
        example("red", "blue", 8),
    )
    assert choose_example([wrong, blind_too, not_blind, short, long][::order]) is long
