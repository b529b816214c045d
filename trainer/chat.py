"""``python -m trainer.chat --checkpoint C --video FILE``: ask a trained model about videos and images.

Files are decoded, sampled, resized and encoded as in a build, so the model sees what it would see of them in shards.
Without ``--question``, questions are read from the terminal line by line, and answered with the earlier turns as
context. Ctrl-D or Ctrl-C ends the conversation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from framestream.pipeline.utils.command_line import (
    CommandParser,
    describe_os_error,
    integer_option,
    name_option,
    number_option,
    path_option,
    run_safely,
)

if TYPE_CHECKING:
    from framestream.trainer.inference.conversation import Conversation


MAX_NEW_TOKENS = 1 << 17  #: largest value of --max-new-tokens
MAX_SECONDS = 1e7  #: largest second of a clip


class ChatError(Exception):
    """Options that do not fit; one line with the fix."""


@run_safely("stopped", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.chat") -> int:
    """Run the command line; returns the exit status.

    The status is 0 done, 1 a file or weights that cannot be read, 2 bad input, 130 Ctrl-C.
    """
    options = _build_parser(prog).parse_args(arguments)
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.pipeline.media.errors import MediaError
    from framestream.trainer.weights.tensor_files import WeightsError

    try:
        _check_options(options)
        conversation = _open_conversation(options)
        if options.sheet:
            _write_sheet(options.sheet, conversation)
        _converse(conversation, options.question)
    except (ChatError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (MediaError, WeightsError, OSError, ValueError) as error:
        reason = describe_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


def _build_parser(prog: str) -> argparse.ArgumentParser:
    parser = CommandParser(prog=prog, description="Ask a trained model about videos and images.")
    parser.add_argument("--checkpoint", type=path_option, required=True, help="a finished run, or a folder of weights")
    parser.add_argument("--manifest", type=name_option, help="the stage's YAML (default: the run's own)")
    parser.add_argument(
        "--video", type=path_option, action="append", default=[], help="a video, GIF or folder of frames; repeatable"
    )
    parser.add_argument(
        "--start", type=number_option(0, MAX_SECONDS), help="second at which a clip of the video begins"
    )
    parser.add_argument("--end", type=number_option(0, MAX_SECONDS), help="second at which it ends")
    parser.add_argument(
        "--image", type=path_option, action="append", default=[], help="an image, shown after the videos; repeatable"
    )
    parser.add_argument("--question", help="ask this and stop (default: read questions from the terminal)")
    parser.add_argument(
        "--max-new-tokens",
        type=integer_option(1, MAX_NEW_TOKENS),
        default=512,
        help="longest answer (default %(default)s)",
    )
    parser.add_argument(
        "--temperature", type=number_option(0, 100), default=0.0, help="sampling temperature; 0 is greedy"
    )
    parser.add_argument(
        "--top-p",
        type=number_option(0, 1, above=True),
        default=1.0,
        help="sample from the most likely tokens whose probabilities reach this sum",
    )
    parser.add_argument("--seed", type=integer_option(0), default=0, help="of sampling")
    parser.add_argument("--sheet", type=path_option, help="write the images that the model sees to this JPEG or PNG")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    if (options.start is not None or options.end is not None) and len(options.video) != 1:
        raise ChatError("--start and --end need exactly one --video; give one")
    if options.sheet and not (options.video or options.image):
        raise ChatError("--sheet shows images; give a --video or an --image")
    if options.sheet and options.sheet.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ChatError(f"--sheet {options.sheet}: name a .jpg or a .png file")
    if options.question is not None and not options.question.strip():
        raise ChatError("--question is empty; leave it out to type questions in the terminal")
    if None not in (options.start, options.end) and options.end <= options.start:
        raise ChatError(f"--end {options.end:g} is not after --start {options.start:g}; give a later second")


def _open_conversation(options: argparse.Namespace) -> Conversation:
    """Load the model and start a conversation about the files."""
    from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
    from framestream.trainer.inference.conversation import Conversation
    from framestream.trainer.inference.generation import Sampling
    from framestream.trainer.inference.predictor import Predictor, resolve_run
    from framestream.trainer.weights.runs import trained_frames

    weights, manifest = resolve_run(options.checkpoint, options.manifest, options.set)
    files = [MediaFile(str(path), options.start, options.end) for path in options.video]
    files += [MediaFile(str(path), reader=IMAGE_READER) for path in options.image]
    sampling = Sampling(options.temperature, options.top_p, options.seed)
    trained = trained_frames(weights) or manifest.frames.max
    if manifest.frames.max > trained:
        print(
            f"note: a video is shown with up to {manifest.frames.max:,} frames; "
            f"the model was trained with at most {trained:,}",
            file=sys.stderr,
        )
    return Conversation(Predictor(weights, manifest), files, options.max_new_tokens, sampling)


def _write_sheet(path: Path, conversation: Conversation) -> None:
    """Write the images that the model sees as a contact sheet."""
    from framestream.trainer.inference.contact_sheet import write_contact_sheet

    images, captions = conversation.input_images()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_contact_sheet(path, images, captions)
    except OSError as error:
        raise ChatError(f"--sheet {path}: cannot be written ({error.strerror})") from None


def _converse(conversation: Conversation, question: str | None) -> None:
    """Print the answer to ``question``, or if None to every line that is typed."""
    if question is not None:
        _print_answer(conversation, question)
        return
    while True:
        try:
            line = _read_line().strip()
        except EOFError:
            print()
            return
        if line:
            try:
                _print_answer(conversation, line)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr)
                print()


def _read_line() -> str:
    """Read a question from the terminal; raises EOFError at the end."""
    if sys.stdin is None:
        raise EOFError
    try:
        return input("> " if sys.stdin.isatty() else "")
    except UnicodeDecodeError as error:
        raise ChatError(f"standard input is not text in {error.encoding}; type or pipe UTF-8") from None


def _print_answer(conversation: Conversation, question: str) -> None:
    for piece in conversation.ask(question):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
