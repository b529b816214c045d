"""Check a shard root: python tools/verify_shards.py shards/stage3

Reads every shard once and compares it with the index, the index with build.json, and both with the ledger and the
files for other readers. Prints one line for each finding (file: what; fix) and exits with 1 if there is any.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started by path: the packages lie beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])


def main(arguments: Sequence[str] | None = None, prog: str = "verify_shards") -> int:
    """Run the command; returns the exit status (0 nothing found, 1 findings, 2 bad input, 130 stopped)."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.partition("\n\n")[2])
    parser.add_argument("root", type=Path, metavar="ROOT", help="a finished build, such as shards/stage3")
    parser.add_argument("--deep", action="store_true", help="decode every frame, too")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", metavar="K", type=int, default=cores, help="default: the cores it may use")
    parser.add_argument("--show", metavar="N", type=int, default=100, help="findings that are printed (100)")
    options = parser.parse_args(arguments)
    if options.workers < 1 or options.show < 1:
        parser.error("--workers and --show must be at least 1")
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("stopped; not everything was checked", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    from framestream.tools.common.text_table import format_bytes
    from framestream.tools.verify.root import VerifyError, verify

    try:
        outcome = verify(options.root, options.deep, options.workers, options.show)
    except (VerifyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    findings = outcome.findings
    for file, what, fix in findings.kept:
        print(f"{file}: {what}; {fix}")
    if findings.count > len(findings.kept):
        print(f"... and {findings.count - len(findings.kept):,} more; --show {findings.count} prints all")
    looked = "decoded" if options.deep else "found whole"
    counts = f"{outcome.shards:,} shards, {outcome.samples:,} samples, {outcome.frames:,} frames {looked}"
    print(f"{options.root}: {counts}, {format_bytes(outcome.bytes)}, {findings.count:,} findings")
    return 1 if findings.count else 0


if __name__ == "__main__":
    sys.exit(main())
