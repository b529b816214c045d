"""Write images of a report as files: a question with its frames and answer, heat maps, learning curves."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFont

from framestream.trainer.evaluation.metrics import is_correct
from framestream.trainer.inference.contact_sheet import write_contact_sheet

MARGIN, LINE = 16, 26  #: pixels around a chart or sheet, and of a line of text
COLUMNS = 2  #: charts side by side
#: the style of pipeline/html/page.html.j2, for charts outside a page
STYLE = """
svg { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif }
text { fill: #1c2430; font-size: 11px }
.title { font-size: 12.5px; font-weight: 600 }
.name { font-size: 15px; font-weight: 600 }
.tick { fill: #5d6878 }
.grid { stroke: #e3e7ed; stroke-width: 1 }
polyline { fill: none; stroke-linejoin: round; stroke-width: 1.6 }
.faint { stroke-width: 1 }
"""


def write_report_images(
    folder: Path,
    loss_charts: Mapping[str, Markup],
    heat_maps: Sequence[Markup] = (),
    examples: Sequence[Mapping[str, Any]] = (),
) -> list[Path]:
    """Write ``loss.svg``, ``haystack.svg`` and ``answer.png`` into ``folder``, each only if there is something to show.

    Args:
        folder: is created if it does not exist.
        loss_charts: the name of each run, and its loss over steps.
        heat_maps: accuracy and blind accuracy of a haystack search.
        examples: questions of an evaluation with their frames and answers; the most telling one is used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {"loss.svg": standalone_svg(list(loss_charts.values()), list(loss_charts))} if loss_charts else {}
    if heat_maps:
        files["haystack.svg"] = standalone_svg(heat_maps)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    written = [folder / name for name in files]
    if examples:
        written.append(folder / "answer.png")
        write_answer(written[-1], choose_example(examples))
    return written


def standalone_svg(charts: Sequence[Markup], names: Sequence[str] = ()) -> str:
    """Return one SVG file with ``charts`` in two columns, each below its name if there are names."""
    sizes = [tuple(map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', chart)[0])) for chart in charts]
    above = LINE if names else 0
    wide, tall = (max(size[axis] for size in sizes) for axis in (0, 1))
    columns = min(COLUMNS, len(charts))
    lines = -(-len(charts) // columns)
    parts = []
    for number, (chart, (width, height)) in enumerate(zip(charts, sizes, strict=True)):
        left = MARGIN + number % columns * (wide + 2 * MARGIN)
        top = MARGIN + number // columns * (tall + above + MARGIN)
        if names:
            parts.append(f'<text class="name" x="{left}" y="{top + 14}">{escape(names[number])}</text>')
        position = f'<svg x="{left}" y="{top + above}" width="{width}" height="{height}"'
        parts.append(str(chart).replace("<svg", position, 1))  # Markup would escape it
    full = (columns * (wide + 2 * MARGIN), lines * (tall + above + MARGIN) + MARGIN)
    size = f'viewBox="0 0 {full[0]} {full[1]}" width="{full[0]}" height="{full[1]}"'
    body = f'<style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{body}</svg>\n'


def choose_example(examples: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the first example with the most frames that is answered correctly, and wrongly when blind."""

    def telling(example: Mapping[str, Any]) -> tuple[bool, int]:
        expected, blind = example["expected"], example["blind_given"]
        sees = blind is not None and is_correct(example["given"], expected) and not is_correct(blind, expected)
        return sees, len(example["frames_jpeg"])

    return max(examples, key=telling)


def write_answer(path: Path, example: Mapping[str, Any]) -> None:
    """Write the frames of a question as a contact sheet, with the question above and the answers below."""
    jpegs = [io.BytesIO(base64.b64decode(text)) for text in example["frames_jpeg"]]
    frames = [np.asarray(Image.open(jpeg, formats=["JPEG"]).convert("RGB")) for jpeg in jpegs]
    write_contact_sheet(path, frames, [f"frame {number}" for number in range(1, len(frames) + 1)])
    with Image.open(path) as file:
        sheet = file.convert("RGB")
    image = Image.new("RGB", (sheet.width + 2 * MARGIN, sheet.height + 2 * (LINE + MARGIN)), "white")
    image.paste(sheet, (MARGIN, MARGIN + LINE))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    draw.text((MARGIN, MARGIN - 6), f"Question: {example['question']}", fill="black", font=font)
    blind = "none" if example["blind_given"] is None else example["blind_given"]
    answers = f"Answer: {example['given']}    expected: {example['expected']}    blind: {blind}"
    draw.text((MARGIN, MARGIN + LINE + sheet.height + 4), answers, fill="black", font=font)
    image.quantize(256, method=Image.Quantize.MEDIANCUT).save(path, optimize=True)
