"""``python -m trainer.report RUN [RUN ...] --out report.html``: write runs and their scores as one HTML page.

The page is self-contained. :mod:`framestream.trainer.evaluation.run_report` lists the files that are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.report") -> int:
    """Run the command line; returns the exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog=prog, description="Write runs and their scores as one HTML page.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, in the order of the stages")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default %(default)s)")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="also write the loss, heat maps and an answer as image files"
    )
    options = parser.parse_args(arguments)
    from framestream.pipeline.utils.atomic_io import write_atomic
    from framestream.trainer.evaluation.run_report import ReportError, read_run, render, write_images

    try:
        runs = [read_run(folder) for folder in options.runs]
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    page = render(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, page.encode())
    if options.images:
        write_images(options.images, runs)
    print(f"{options.out}: {len(runs)} runs, {len(page) / 1e3:,.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
