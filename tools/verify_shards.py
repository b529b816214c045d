"""Check a shard root: python tools/verify_shards.py shards/stage3

Reads every shard once. Compares the shards with the index, and the index with build.json, the ledger and the files for
other readers. Prints one line for each finding (file: problem; fix). The exit status is 1 if there are findings.
"""

from __future__ import annotations

import argparse
import os
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


@run_safely("Stopped. Not everything was checked.")
def main(arguments: Sequence[str] | None = None, prog: str = "verify_shards") -> int:
    """Run the command. Returns the exit status: 0 no findings, 1 findings, 2 bad input, 130 stopped."""
    parser = CommandParser(prog=prog, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("root", type=path_option, metavar="ROOT", help="a finished build, such as shards/stage3")
    parser.add_argument("--deep", action="store_true", help="also decode every frame")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        metavar="K",
        type=integer_option(1, 4096),
        default=cores,
        help="processes (default: the available cores)",
    )
    parser.add_argument(
        "--show", metavar="N", type=integer_option(1), default=100, help="findings to print (default: 100)"
    )
    options = parser.parse_args(arguments)
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    from framestream.tools.common.text_table import format_bytes
    from framestream.tools.verify.root import VerifyError, verify

    try:
        result = verify(options.root, options.deep, options.workers, options.show)
    except (VerifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    findings = result.findings
    for file, problem, fix in findings.listed:
        print(f"{file}: {problem}; {fix}")
    if findings.count > len(findings.listed):
        print(f"... and {findings.count - len(findings.listed):,} more; --show {findings.count} prints all")
    checked = "decoded" if options.deep else "checked"
    counts = f"{result.shards:,} shards, {result.samples:,} samples, {result.frames:,} frames {checked}"
    print(f"{options.root}: {counts}, {format_bytes(result.bytes)}, {findings.count:,} findings")
    return 1 if findings.count else 0


if __name__ == "__main__":
    sys.exit(main())
