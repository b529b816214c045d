"""Build the shards of a stage: python tools/build_shards.py --stage 3

Reads the annotation files of the manifest and decodes every distinct video and image once. Writes
OUT/stageN/{video,image,dialogue}/*.tar with their index and ledger. Run the same command again to continue after an
interruption. A finished build is not repeated. The ledger lists what could not be built, and why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the packages are beside this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from framestream.pipeline.utils.command_line import (  # noqa: E402 - needs the path above
    CommandParser,
    integer_option,
    name_option,
    number_option,
    path_option,
    run_safely,
)

EXIT_LOST = 3  #: the build is finished, but nothing of an entry could be built
MAX_CACHE_GB = 100_000.0  #: largest value of --cache-gb


@run_safely("Stopped. Run the same command to continue.")
def main(arguments: Sequence[str] | None = None, prog: str = "build_shards") -> int:
    """Run the command.

    Returns:
        The exit status: 0 done, 1 the build failed, 2 bad input, 3 done but no dialogue of an entry, 130 stopped.
    """
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    if options.report and not options.dry_run:
        parser.error("--report needs --dry-run")
    if options.address and options.executor != "ray":
        parser.error("--address needs --executor ray")
    if (options.rank is None) != (options.of is None):
        parser.error("--rank and --of must be given together: machine I (from 0) of N")
    if options.retry_failed and options.of:
        parser.error("--retry-failed works on one machine or a Ray cluster; remove --rank and --of")
    options.rank, options.of = options.rank or 0, options.of or 1
    if not 0 <= options.rank < options.of:
        parser.error(f"--rank {options.rank}: must be from 0 to {options.of - 1}, because --of is {options.of}")
    return _run(options)


def _run(options: argparse.Namespace) -> int:
    # Imported here so that --help is fast, and Ctrl-C during the imports ends in a line.
    from framestream.pipeline.annotations.reader import AnnotationFileError
    from framestream.pipeline.config.manifest import ManifestError, load_build_manifest
    from framestream.pipeline.shards.ledger import LedgerError, read_ledger
    from framestream.tools.builder import executors
    from framestream.tools.builder.build import BuildOptions, build
    from framestream.tools.builder.plan_report import plan_rows, plan_summary, write_report
    from framestream.tools.builder.planner import make_plan
    from framestream.tools.builder.summary import build_summary, first_messages, lost_entries, shard_counts
    from framestream.tools.common.errors import BuildError, WorkerError
    from framestream.tools.fetch.disk_cache import DiskFullError, disk_full_at
    from framestream.tools.fetch.root_map import resolve_entries

    path = options.manifest or f"manifests/stage{options.stage}.yaml"
    try:
        manifest = load_build_manifest(path, options.set)
        if manifest.stage != options.stage:
            raise ManifestError(
                f"{path}: stage: is {manifest.stage}; give --stage {manifest.stage} or another manifest"
            )
        if options.out:
            manifest = replace(manifest, shards=options.out)
        if options.report:
            _make_folder("--report", Path(options.report))
        if options.dry_run:
            entries = resolve_entries(manifest, quick=True)
            rows = plan_rows(entries, make_plan(manifest, entries, None, options.limit, strict=False))
            print(plan_summary(rows))
            if options.report:
                with _option_errors("--report", Path(options.report)):
                    write_report(Path(options.report), str(path), rows)
                print(f"report: {options.report}/plan.html, {options.report}/plan.parquet")
            return 0
        executor = executors.ray(options.address) if options.executor == "ray" else executors.local(options.workers)
        settings = BuildOptions(
            limit=options.limit,
            skip_unresolved=options.skip_unresolved,
            retry_failed=options.retry_failed,
            rank=options.rank,
            ranks=options.of,
            cache_bytes=round(options.cache_gb * 1e9),
            workers_here=options.executor == "local",
        )
        with disk_full_at(manifest.shard_root):
            result = build(manifest, executor, settings)
        record = result.record
        ledger = read_ledger(manifest.shard_root) if record else None
    except (ManifestError, BuildError, AnnotationFileError, WorkerError, DiskFullError, LedgerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, (WorkerError, DiskFullError)) else 2
    if record is None or ledger is None:
        print(f"{manifest.shard_root}: this machine is done; other machines still build {result.media_left:,} media")
        return 0
    lost = lost_entries(record, ledger)
    if not result.built:
        reason = "nothing to retry" if options.retry_failed else "nothing to do"
        print(f"{manifest.shard_root}: already finished, {reason}")
        return _exit_status(lost)
    for entry in record["entries"]:
        if "empty_annotation" in entry["left_out"].get("entry", {}):
            print(f"warning: entry {entry['name']}: the annotation file has no samples", file=sys.stderr)
    print(build_summary(record))
    print(f"shards: {manifest.shard_root} ({shard_counts(record)})")
    if any(entry["left_out"] for entry in record["entries"]):
        print(f"left out, with reasons: {manifest.shard_root / 'ledger' / 'ledger.parquet'}")
        print(first_messages(ledger))
    return _exit_status(lost)


def _exit_status(lost: str) -> int:
    """Print which entries are lost, if any, and return the status of the command."""
    if lost:
        print(f"error: {lost}", file=sys.stderr)
    return EXIT_LOST if lost else 0


@contextlib.contextmanager
def _option_errors(option: str, path: Path) -> Iterator[None]:
    """Say which option names a ``path`` that cannot be written."""
    from framestream.tools.common.errors import BuildError

    try:
        yield
    except OSError as error:
        reason = "is a file" if isinstance(error, (FileExistsError, NotADirectoryError)) else error.strerror
        raise BuildError(f"{option} {path}: cannot be written ({reason}); name another folder") from None


def _make_folder(option: str, path: Path) -> None:
    with _option_errors(option, path):
        path.mkdir(parents=True, exist_ok=True)


def _parser(prog: str) -> CommandParser:
    parser = CommandParser(prog=prog, description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--stage", type=int, required=True, choices=(1, 2, 3, 4))
    parser.add_argument(
        "--manifest", type=name_option, metavar="PATH", help="manifest file (default: manifests/stageN.yaml)"
    )
    parser.add_argument(
        "--out", type=name_option, metavar="OUT", help="write OUT/stageN instead of the manifest's shards folder"
    )
    parser.add_argument(
        "--workers",
        metavar="K",
        type=integer_option(1, 4096),
        default=len(os.sched_getaffinity(0)),
        help="worker processes (default: the available cores)",
    )
    parser.add_argument(
        "--limit", metavar="N", type=integer_option(1), help="use only the first N dialogues of each entry"
    )
    parser.add_argument("--dry-run", action="store_true", help="only report what would be built and what is missing")
    parser.add_argument(
        "--report",
        type=path_option,
        metavar="DIR",
        help="write the report of --dry-run to plan.html and plan.parquet in DIR",
    )
    parser.add_argument(
        "--skip-unresolved", action="store_true", help="leave out entries whose annotations or media cannot be found"
    )
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="retry what failed for a temporary reason, and add it to the finished shards",
    )
    parser.add_argument(
        "--cache-gb",
        metavar="GB",
        type=number_option(0, MAX_CACHE_GB),
        default=20.0,
        help="disk space for fetched files, in gigabytes; clips of one file share it (default: 20)",
    )
    parser.add_argument(
        "--rank", metavar="I", type=integer_option(0), help="number of this machine, from 0; needs --of"
    )
    parser.add_argument("--of", metavar="N", type=integer_option(1), help="number of machines that share this build")
    parser.add_argument("--executor", choices=("local", "ray"), default="local", help="ray: run on a Ray cluster")
    parser.add_argument("--address", metavar="HOST:PORT", default="", help="address of the Ray cluster")
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="override a field of the manifest, such as frames.size=224",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
