"""``python -m trainer.haystack --manifest M --needles FILE --root DIR --video FILE``: find images in long videos.

Every question of the annotation file is about one image. The image replaces one frame of a video, and the question is
asked for every number of frames and every depth (:mod:`framestream.pipeline.evaluation.haystack`). It is also asked
blind, with the image of another question whose answer differs. Results are written to RUN/haystack.json, and as a heat
map to ``python -m trainer.report RUN`` and to ``--html``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from framestream.pipeline.utils.command_line import integer_option, number_option, path_option, run_safely
from framestream.trainer.evaluation.cli import build_parser, run_command

if TYPE_CHECKING:
    from framestream.pipeline.config.manifest import Manifest
    from framestream.trainer.evaluation.rank_pool import RankPool

FRAMES = (8, 32, 128, 512)
MAX_FRAMES = 65536  #: largest value of --frames; a frame of 448 pixels takes 0.6 MB of memory
DEPTHS = (0, 25, 50, 75, 100)


@run_safely("stopped; nothing was written", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.haystack") -> int:
    """Run the command line; returns the exit status: 0 done, 1 files that cannot be read, 2 bad input, 130 Ctrl-C."""
    description = "Find images that replace one frame of a long video."
    parser = build_parser(prog, description, "the stage's YAML", "haystack.json")
    parser.add_argument(
        "--needles", type=path_option, required=True, help="annotation file: images with a question each"
    )
    parser.add_argument("--root", type=path_option, required=True, help="folder that its image paths are relative to")
    parser.add_argument(
        "--video",
        type=path_option,
        action="append",
        required=True,
        help="insert the images in this video; repeat it for several videos",
    )
    parser.add_argument(
        "--frames",
        type=integer_option(1, MAX_FRAMES),
        nargs="+",
        default=FRAMES,
        help="numbers of frames (%(default)s)",
    )
    parser.add_argument("--depths", type=number_option(0, 100), nargs="+", default=DEPTHS, help="percent (%(default)s)")
    return run_command(parser, arguments, _score, _page, _table, lambda _: "haystack.json")


def _score(options: argparse.Namespace, manifest: Manifest, checkpoint: Path, ranks: RankPool) -> dict | None:
    from framestream.pipeline.evaluation.haystack import Haystack
    from framestream.trainer.evaluation.haystack_search import run_haystack

    _check_options(options, manifest)
    frames, depths = sorted(set(options.frames)), sorted(set(options.depths))
    haystack = Haystack(manifest, options.needles, options.root, list(map(str, options.video)), frames, depths)
    return run_haystack(manifest, checkpoint, haystack, ranks)


def _check_options(options: argparse.Namespace, manifest: Manifest) -> None:
    from framestream.pipeline.config.manifest import ManifestError

    clip = manifest.frames.clip_frames
    for count in options.frames:
        if count < clip or count % clip:
            raise ManifestError(f"--frames {count}: must be a multiple of {clip}, the frames of a clip")


def _page(result: dict) -> str:
    from framestream.trainer.evaluation.haystack_html import render_haystack_page

    return render_haystack_page(result)


def _table(result: dict) -> list[str]:
    """Format the accuracies of generation as lines of text: one line for each depth, one column for each length."""
    rows = [row for row in result["families"] if row["method"] == "generation"]
    frames, depths = (sorted({row[name] for row in rows}) for name in ("frames", "depth"))
    values = {(row["frames"], row["depth"]): row["accuracy"] for row in rows}
    lines = ["depth".rjust(8) + "".join(f"{count:>8}" for count in frames) + "  frames"]
    for depth in depths:
        cells = (values.get((count, depth)) for count in frames)
        lines.append(f"{depth:>6g} %" + "".join(f"{'':>8}" if v is None else f"{v:>8.1f}" for v in cells))
    for row in filter(None, (result["trained"], result["deepest"])):
        interval = f"{row['gain_low']:.1f} to {row['gain_high']:.1f}"
        lines.append(
            f"{row['family']}: {row['accuracy']:.1f} % of {row['questions']}, blind {row['blind']:.1f}, "
            f"gain {row['gain']:.1f} ({interval})"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
