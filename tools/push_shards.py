"""Upload a finished shard root: python tools/push_shards.py shards/stage3 hf://datasets/OWNER/NAME

Checks the root, uploads what is not there yet, and compares sizes and digests afterwards. A stopped upload continues
when the command is repeated. Readers see a complete root or none.
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
    name_option,
    path_option,
    run_safely,
)


@run_safely("Stopped. Run the command again to continue.")
def main(arguments: Sequence[str] | None = None, prog: str = "push_shards") -> int:
    """Run the command. Returns the exit status: 0 done, 1 a fault of root or upload, 2 bad input or refused."""
    parser = CommandParser(prog=prog, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("root", type=path_option, metavar="ROOT", help="a finished build, such as shards/stage3")
    parser.add_argument(
        "target",
        type=name_option,
        metavar="ADDRESS",
        help="hf://datasets/OWNER/NAME[@BRANCH][/PATH], hf://buckets/OWNER/NAME[/PATH], s3://BUCKET/PATH, "
        "gs://BUCKET/PATH or az://CONTAINER/PATH",
    )
    parser.add_argument("--replace", action="store_true", help="remove another root or other files that are there")
    parser.add_argument(
        "--private", action="store_true", help="create a repository or bucket of the hub as private, if it is missing"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument(
        "--workers",
        metavar="K",
        type=integer_option(1, 4096),
        default=cores,
        help="processes that check the root (default: the available cores)",
    )
    return _run(parser.parse_args(arguments))


def _run(options: argparse.Namespace) -> int:
    from framestream.pipeline.upload.addresses import open_target
    from framestream.pipeline.upload.files import RefusedError, UploadError
    from framestream.pipeline.upload.shard_root import push_root
    from framestream.tools.common.text_table import format_bytes
    from framestream.tools.verify.root import VerifyError, verify

    try:
        target = open_target(options.target, True if options.private else None)
        findings = verify(options.root, deep=False, workers=options.workers, max_listed=1).findings
        if findings.count:
            file, problem, fix = findings.listed[0]
            print(f"error: {file}: {problem}; {fix} ({findings.count:,} findings; see verify_shards)", file=sys.stderr)
            return 1
        result = push_root(options.root, target, options.replace)
    except (RefusedError, VerifyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UploadError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sent = f"{result.sent:,} were sent now ({format_bytes(result.sent_bytes)})"
    total = f"{result.files:,} files ({format_bytes(result.bytes)})"
    print(f"{target.display_url}: has {total} of {options.root}, compared by size and digest; {sent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
