"""What the commands that score a model share: common options, error handling and output.

A command parses its options with :func:`build_parser` before it imports anything heavy, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from framestream.pipeline.utils.command_line import CommandParser, describe_os_error, name_option, path_option

if TYPE_CHECKING:
    from framestream.pipeline.config.manifest import Manifest
    from framestream.trainer.evaluation.rank_pool import RankPool


def build_parser(prog: str, description: str, manifest: str, results: str) -> argparse.ArgumentParser:
    """Build the parser of a command that scores a model, with the common options.

    Args:
        prog: name of the command in its help.
        description: of the command.
        manifest: help of the option ``--manifest``.
        results: names of the files of results below RUN, for the help.
    """
    parser = CommandParser(prog=prog, description=description)
    parser.add_argument("--manifest", type=name_option, required=True, help=manifest)
    parser.add_argument(
        "--checkpoint", type=path_option, help="a finished run, or a folder of weights (default: the manifest's run)"
    )
    of_the_run = "of the run that is scored; other weights need it"
    parser.add_argument(
        "--out", type=path_option, help=f"file of results to write (default: RUN/{results} {of_the_run})"
    )
    parser.add_argument("--html", type=path_option, help="also write the results as a page to this file")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    score: Callable[[argparse.Namespace, Manifest, Path, RankPool], dict | None],
    page: Callable[[dict], str],
    table: Callable[[dict], Iterable[str]],
    name: Callable[[argparse.Namespace], str],
) -> int:
    """Parse the command line, score the model, and write the result to files and to the terminal.

    Args:
        parser: of the command line.
        arguments: the command line; that of the process if None.
        score: from options, manifest, folder of weights and ranks to the result, a JSON object; None on other ranks
            than rank 0.
        page: renders the result as HTML.
        table: renders the result as lines of text.
        name: of the file of results below RUN.

    Returns:
        the exit status: 0 done, 1 media or weights that cannot be read or another rank that failed, 2 bad input.
    """
    options = parser.parse_args(arguments)
    from framestream.pipeline.config.manifest import load_manifest
    from framestream.trainer.distributed.launchers import LaunchError
    from framestream.trainer.evaluation.rank_pool import join_ranks
    from framestream.trainer.weights.runs import locate_paths, warn_of_frame_size

    def run(ranks: RankPool) -> int:
        manifest = locate_paths(load_manifest(options.manifest, options.set), Path(options.manifest))
        weights = _resolve_weights(options, manifest)
        out = options.out or _folder_of_results(options, manifest, weights) / name(options)
        with contextlib.ExitStack() as stack:
            if ranks.is_main:
                for path in filter(None, (out, options.html)):
                    _check_writable(path)
                stack.enter_context(_lock_results(out))
                warn_of_frame_size(weights, manifest)
            result = score(options, manifest, weights, ranks)
            if result is None:
                return 0
            result["command"] = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
            return _write(result, out, options.html, page, table)

    try:
        with join_ranks() as ranks:
            return _run_on(ranks, run)
    except LaunchError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2


def _run_on(ranks: RankPool, run: Callable[[RankPool], int]) -> int:
    """Run a command on this rank; return its exit status. Of several ranks that fail, one says why."""
    import torch

    from framestream.pipeline.annotations.reader import AnnotationFileError
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.pipeline.media.errors import MediaError
    from framestream.pipeline.shards.index import ShardsError
    from framestream.trainer.evaluation.rank_pool import RankFailedError
    from framestream.trainer.weights.tensor_files import WeightsError

    status = 1
    try:
        return run(ranks)
    except RankFailedError:
        return 1
    except (AnnotationFileError, ManifestError, ShardsError) as error:
        line, status = str(error), 2
    except (MediaError, WeightsError) as error:
        line = str(error)
    except torch.OutOfMemoryError as error:
        line = f"rank {ranks.rank} has not enough memory ({' '.join(str(error).split()):.200}); lower evaluate.batch"
    except BaseException:
        if ranks.is_first_failure():
            raise
        return 1
    if ranks.is_first_failure():
        print(f"error: {line}", file=sys.stderr)
    return status


def _write(
    result: dict,
    out: Path,
    html: Path | None,
    page: Callable[[dict], str],
    table: Callable[[dict], Iterable[str]],
) -> int:
    """Write the result to its files and to the terminal; returns the exit status."""
    from framestream.pipeline.utils.atomic_io import write_atomic
    from framestream.pipeline.utils.records import write_record

    written = [out]
    try:
        write_record(out, result)
        if html:
            html.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(html, page(result).encode())
            written.append(html)
    except OSError as error:
        print(f"error: {describe_os_error(error)}; the results cannot be written, name another file", file=sys.stderr)
        return 1
    for line in (*table(result), *_notes(result, out), *written):
        print(line)
    return 0


@contextlib.contextmanager
def _lock_results(out: Path) -> Iterator[None]:
    """Create the folder of the file of results ``out``, and lock the file against other evaluations.

    Raises:
        ManifestError: another evaluation has the lock, or the folder cannot be written.
    """
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.pipeline.utils.locks import LockError, LocksUnsupportedError, lock_folder

    lock = out.with_name(f"{out.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(out.parent, lock.name, f"evaluation to {out.name}"))
            stack.callback(lock.unlink, missing_ok=True)
        except LocksUnsupportedError:
            out.parent.mkdir(parents=True, exist_ok=True)
        except LockError as error:
            raise ManifestError(f"{error}, or name another file of results with --out") from None
        yield


def _check_writable(path: Path) -> None:
    """Raise ManifestError if a file of results cannot be written, before any question is asked."""
    from framestream.pipeline.config.manifest import ManifestError

    above = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise ManifestError(f"{path}: is a folder; name a file of results")
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ManifestError(f"{path}: cannot be written, because of {above}; name another file of results with --out")


def _resolve_weights(options: argparse.Namespace, manifest: Manifest) -> Path:
    """Return the folder of weights that the options name, or that of the manifest's run."""
    from framestream.trainer.weights.runs import resolve_weights
    from framestream.trainer.weights.tensor_files import WeightsError

    try:
        return resolve_weights(options.checkpoint or manifest.output)
    except WeightsError:
        if options.checkpoint:
            raise
        train = f"python -m trainer --manifest {options.manifest}"
        raise WeightsError(
            f"{manifest.output}: no weights there; train it first, {train}, or name a --checkpoint"
        ) from None


def _folder_of_results(options: argparse.Namespace, manifest: Manifest, weights: Path) -> Path:
    """Return the folder of the run that is scored, where its results are written without ``--out``.

    Raises:
        ManifestError: the weights belong to no run.
        WeightsError: their config.json is damaged.
    """
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.trainer.weights.runs import run_of_weights

    if not options.checkpoint:
        return Path(manifest.output)
    run = run_of_weights(weights)
    if run is None:
        raise ManifestError(
            f"{options.checkpoint}: these weights belong to no run; name the file of results with --out"
        )
    return run


def _notes(result: dict, out: Path) -> Iterator[str]:
    """Yield a line for more frames than were trained, and for each kind of question without a fair answer.

    Args:
        result: the object of the file of results.
        out: the file of results.
    """
    if result["max_frames"] > result["trained_frames"]:
        yield (
            f"videos are shown with up to {result['max_frames']:,} frames; "
            f"the model was trained with at most {result['trained_frames']:,}"
        )
    if result["without_partner"]:
        families = ", ".join(result["without_partner"])
        yield (
            f"{result['not_asked']:,} not asked, because no other question of the family has another answer and media "
            f"that do not contain what is asked about (no blind control): {families}"
        )
    if result["without_blind"]:
        families = ", ".join(result["without_blind"])
        yield (
            "no blind control, because no question of the family has another answer and media that do not contain "
            f"what is asked about: {families}"
        )
    if result["too_long"]:
        yield (
            f"{result['too_long']} expected answers have more tokens than evaluate.max_new_tokens: "
            "generation cannot answer them correctly"
        )
    if result["unreadable"]:
        yield (
            f"{len(result['unreadable']):,} left out, each with its reason in `unreadable` of {out}; "
            f"the first: {result['unreadable'][0]}"
        )
