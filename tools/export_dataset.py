"""Export a shard root for trainers that read files:
python tools/export_dataset.py shards/stage3 --format swift --out exported

Writes every video as mp4 and every image as jpg, with the bytes and the times of the shards. Then writes the annotation
files train and val in the form of the trainer. A repeated command goes on where it was stopped.
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
    name_option,
    path_option,
    run_safely,
)

FORMAT_NAMES = ("llava", "llamafactory", "swift", "qwen-vl", "sharegpt")


@run_safely("Stopped. Repeat the command to go on.")
def main(arguments: Sequence[str] | None = None, prog: str = "export_dataset") -> int:
    """Run the command. Returns the exit status: 0 done, 1 damaged or unreachable shards, 2 bad input, 130 stopped."""
    parser = CommandParser(prog=prog, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument(
        "root", type=name_option, metavar="ROOT", help="folder or address of a finished build, such as shards/stage3"
    )
    parser.add_argument("--format", choices=FORMAT_NAMES, required=True, help="the trainer that reads the files")
    parser.add_argument(
        "--out", type=path_option, metavar="DIR", required=True, help="empty folder, or one of the same export"
    )
    parser.add_argument(
        "--workers",
        metavar="K",
        type=integer_option(1, 256),
        default=8,
        help="threads that read and write media (default: 8)",
    )
    return _run(parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    import pyarrow as pa

    from framestream.pipeline.shards.index import ShardsError
    from framestream.pipeline.utils.locks import LockError
    from framestream.pipeline.utils.records import RecordError
    from framestream.tools.export.export import LEFT_OUT, export_root
    from framestream.tools.export.folder import DatasetExportError

    try:
        counts = export_root(options.root, options.format, options.out, options.workers)
    except (ShardsError, DatasetExportError, LockError, RecordError, pa.ArrowException) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    dialogues = ", ".join(f"{split} {count:,}" for split, count in counts.dialogues.items()) or "none"
    print(f"{options.out}: dialogues: {dialogues}; media: {counts.media:,}")
    if counts.left_out:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(counts.left_out.items()))
        print(f"left out: {reasons}; see {options.out / LEFT_OUT}")
    if counts.damaged:
        fix = "restore the shards and repeat the command"
        print(f"error: {counts.damaged:,} media are damaged, so dialogues are left out; {fix}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
