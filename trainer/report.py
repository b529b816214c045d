"""``python -m trainer.report RUN [RUN ...] --out report.html``: write runs and their scores as one HTML page.

The page is self-contained. :mod:`framestream.trainer.evaluation.run_report` lists the files that are read.
What is damaged is named and left out, and the rest is reported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from framestream.pipeline.utils.command_line import CommandParser, describe_os_error, path_option, run_safely


@run_safely("stopped; no page was written")
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.report") -> int:
    """Run the command line; returns the exit status: 0 done, 1 something damaged was left out, 2 bad input."""
    parser = CommandParser(prog=prog, description="Write runs and their scores as one HTML page.")
    parser.add_argument(
        "runs", nargs="+", type=path_option, metavar="RUN", help="folder of a run, in the order of the stages"
    )
    parser.add_argument(
        "--out", type=path_option, default=Path("report.html"), help="file to write (default %(default)s)"
    )
    parser.add_argument(
        "--images", type=path_option, metavar="DIR", help="also write the loss, heat maps and an answer as image files"
    )
    options = parser.parse_args(arguments)
    from framestream.pipeline.utils.atomic_io import write_atomic
    from framestream.trainer.evaluation.run_files import ReportError
    from framestream.trainer.evaluation.run_report import read_run, render, write_images

    runs, faults = [], []
    for folder in options.runs:
        try:
            runs.append(read_run(folder))
            faults += runs[-1].faults
        except ReportError as error:
            faults.append(str(error))
        except OSError as error:
            faults.append(describe_os_error(error))
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    if not runs:
        return 2
    try:
        page = render(runs)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.out, page.encode())
        if options.images:
            write_images(options.images, runs)
    except OSError as error:
        print(f"error: {describe_os_error(error)}; name another file", file=sys.stderr)
        return 2
    print(f"{options.out}: {len(runs)} runs, {len(page) / 1e3:,.0f} kB")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
