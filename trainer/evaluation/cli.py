"""What the commands that score a model share: their common options, and how they end."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from framestream.pipeline.annotations.reader import AnnotationFileError
from framestream.pipeline.config.manifest import Manifest, ManifestError, load_manifest
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.trainer.weights.runs import resolve_weights
from framestream.trainer.weights.tensor_files import WeightsError


def build_parser(prog: str, description: str, manifest: str, results: str) -> argparse.ArgumentParser:
    """Options of a command that scores a model.

    Args:
        prog: name of the command in its help.
        manifest: what is said of that option.
        results: files below RUN that results go to, as the help names them.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--manifest", required=True, help=manifest)
    parser.add_argument(
        "--checkpoint", type=Path, help="a finished run, or a folder of weights; the manifest's run if not given"
    )
    parser.add_argument("--out", type=Path, help=f"file of the results; RUN/{results} if not given")
    parser.add_argument("--html", type=Path, help="write a page of them, too")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    return parser


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    ask: Callable[[argparse.Namespace, Manifest, Path], dict],
    page: Callable[[dict], str],
    table: Callable[[dict], Iterable[str]],
    name: Callable[[argparse.Namespace], str],
) -> int:
    """Parse the command line, ask the model, and write what was found to files and to the terminal.

    Args:
        ask: options, manifest and folder of weights to the result, an object of JSON.
        page, table: the result as HTML, and as lines of text.
        name: of the file of results below RUN.

    Returns:
        the exit status (0 done, 1 media or weights that cannot be read, 2 bad input).
    """
    options = parser.parse_args(arguments)
    try:
        manifest = load_manifest(options.manifest, options.set)
        result = ask(options, manifest, _weights(options, manifest))
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    except (AnnotationFileError, ManifestError, ShardsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MediaError, WeightsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    result["command"] = " ".join([parser.prog, *(sys.argv[1:] if arguments is None else arguments)])
    for line in (*table(result), *_notes(result)):
        print(line)
    written = {options.out or Path(manifest.output) / name(options): json.dumps(result, indent=1)}
    if options.html:
        written[options.html] = page(result)
    for path, text in written.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        except OSError as error:
            print(f"error: {path}: cannot be written ({error.strerror}); name another place", file=sys.stderr)
            return 1
        print(path)
    return 0


def _weights(options: argparse.Namespace, manifest: Manifest) -> Path:
    try:
        return resolve_weights(options.checkpoint or manifest.output)
    except WeightsError:
        if options.checkpoint:
            raise
        train = f"python -m trainer --manifest {options.manifest}"
        raise WeightsError(
            f"{manifest.output}: no weights there; train it first, {train}, or name a --checkpoint"
        ) from None


def _notes(result: dict) -> Iterator[str]:
    """What was not asked, and what could not be right, a line each."""
    if result["without_partner"]:
        named = ", ".join(result["without_partner"])
        yield f"not asked, because the family has no other answer to be blind with, in: {named}"
    if result["too_long"]:
        yield f"{result['too_long']} answers have more tokens than evaluate.max_new_tokens: no generated one is right"
    if result["unreadable"]:
        yield f"{len(result['unreadable'])} questions left out; the first: {result['unreadable'][0]}"
