"""Inspect a shard root: python tools/inspect_shards.py shards/stage3 --html inspection.html

Writes one self-contained HTML page: counts by dataset, histograms, what was left out and why, and contact sheets of a
sample of the media with their dialogues. Reads only the index and that sample.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the packages are beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from framestream.pipeline.utils.command_line import (  # noqa: E402 - needs the path above
    CommandParser,
    integer_option,
    path_option,
    run_safely,
)


@run_safely("Stopped. No page was written.")
def main(arguments: Sequence[str] | None = None, prog: str = "inspect_shards") -> int:
    """Run the command. Returns the exit status: 0 done, 2 bad input, 130 stopped."""
    parser = CommandParser(prog=prog, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("root", type=path_option, metavar="ROOT", help="a finished build, such as shards/stage3")
    parser.add_argument("--html", type=path_option, metavar="OUT", required=True, help="HTML page to write")
    parser.add_argument(
        "--media", metavar="N", type=integer_option(0), default=24, help="media on the contact sheets (default: 24)"
    )
    parser.add_argument(
        "--frames", metavar="N", type=integer_option(1), default=8, help="most frames to show of each (default: 8)"
    )
    parser.add_argument(
        "--seed", metavar="N", type=integer_option(0), default=0, help="seed of the sample (default: 0)"
    )
    options = parser.parse_args(arguments)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    import pyarrow as pa

    from framestream.pipeline.shards.index import ShardsError
    from framestream.pipeline.shards.ledger import LedgerError
    from framestream.pipeline.utils.atomic_io import write_atomic
    from framestream.tools.inspection.report import inspection_page

    try:
        page = inspection_page(options.root, options.media, options.frames, options.seed).encode()
    except (ShardsError, LedgerError, OSError, pa.ArrowException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        options.html.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(options.html, page)
    except OSError as error:
        print(f"error: --html {options.html}: cannot be written ({error.strerror}); name another file", file=sys.stderr)
        return 2
    print(f"{options.html}: {len(page) / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
