"""``python -m trainer.haystack --manifest M --needles FILE --root DIR --video FILE``: find images in long videos.

Every question of the annotation file is about one image. The image replaces one frame of a video, and the question is
asked for every number of frames and every depth (:mod:`framestream.pipeline.evaluation.haystack`). It is also asked
blind, with the image of another question whose answer differs. With ``--hops``, a chain of images replaces several
frames, and each names the next (:mod:`framestream.pipeline.evaluation.needle_chains`). Results are written to
RUN/haystack.json of the run that is scored, and as a heat map to ``python -m trainer.report RUN`` and to ``--html``.
They have the seconds and the peak memory of each number of frames.
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
MAX_FRAMES = 65536  #: largest value of --frames
MAX_HOPS = 64  #: largest number of images in a chain
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
        type=_frames_option,
        nargs="+",
        default=[FRAMES],
        help=f"numbers of frames ({' '.join(map(str, FRAMES))})",
    )
    parser.add_argument(
        "--depths", type=number_option(0, 100), nargs="+", help=f"percent ({' '.join(map(str, DEPTHS))})"
    )
    parser.add_argument(
        "--hops",
        type=_hops_option,
        help="hide chains of this many images, each naming the next; or `given`: the images of a question "
        "are its chain",
    )
    parser.add_argument(
        "--limit", type=integer_option(1), help="ask only the first LIMIT questions of each number of frames and depth"
    )
    return run_command(parser, arguments, _score, _page, _table, lambda _: "haystack.json")


def _frames_option(text: str) -> list[int]:
    """Parse ``--frames``: numbers, separated by commas."""
    return [integer_option(1, MAX_FRAMES)(number) for number in text.split(",")]


def _hops_option(text: str) -> int | str:
    """Parse ``--hops``: a number of images, or ``given``."""
    return text if text == "given" else integer_option(2, MAX_HOPS)(text)


def _score(options: argparse.Namespace, manifest: Manifest, checkpoint: Path, ranks: RankPool) -> dict | None:
    from framestream.pipeline.evaluation.haystack import Haystack
    from framestream.pipeline.evaluation.needle_chains import GIVEN
    from framestream.trainer.evaluation.haystack_search import run_haystack

    frames = sorted({count for counts in options.frames for count in counts})
    _check_options(options, manifest, frames)
    depths, videos = sorted(set(options.depths or DEPTHS)), list(map(str, options.video))
    hops = GIVEN if options.hops == "given" else options.hops
    haystack = Haystack(manifest, options.needles, options.root, videos, frames, depths, hops)
    return run_haystack(manifest, checkpoint, haystack, ranks, options.limit)


def _check_options(options: argparse.Namespace, manifest: Manifest, frames: Sequence[int]) -> None:
    from framestream.pipeline.config.manifest import ManifestError

    if options.hops is not None and options.depths:
        raise ManifestError("--hops spreads the images of a chain over the video; leave out --depths")
    clip = manifest.frames.clip_frames
    for count in frames:
        if count < clip or count % clip:
            raise ManifestError(f"--frames {count}: must be a multiple of {clip}, the frames of a clip")


def _page(result: dict) -> str:
    from framestream.trainer.evaluation.haystack_html import render_haystack_page

    return render_haystack_page(result)


def _table(result: dict) -> list[str]:
    """Format accuracies and costs as lines of text: one line for each depth, one column for each number of frames."""
    return [*_needle_lines(result), *_chain_lines(result["chains"]), *_cost_lines(result["costs"])]


def _needle_lines(result: dict) -> list[str]:
    rows = [row for row in result["families"] if row["method"] == "generation"]
    if not rows:
        return []
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


def _chain_lines(rows: Sequence[dict]) -> list[str]:
    lines = []
    for row in rows:
        kinds = ", ".join(f"{kind} {share:.1f}" for kind, share in row["kinds"].items())
        lines.append(
            f"{row['family']}: {row['accuracy']:.1f} % of {row['questions']} ({kinds}), blind {row['blind']:.1f}, "
            f"gain {row['gain']:.1f}; all questions correct of {row['all_correct']} of {row['chains']} chains"
        )
    return lines


def _cost_lines(rows: Sequence[dict]) -> list[str]:
    lines = [f"{'frames':>8}{'prompts':>10}{'s/prompt':>10}{'peak GiB':>10}"] if rows else []
    for row in rows:
        seconds, memory = row["seconds"] / row["prompts"], row["peak_memory"] / 2**30
        lines.append(f"{row['frames']:>8}{row['prompts']:>10}{seconds:>10.2f}{memory:>10.2f}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
