"""``python -m trainer.chat --checkpoint C --video FILE``: ask a trained model about videos and pictures.

Files are decoded, sampled, resized and encoded as a build does it, so that the model sees what it would see of them in
shards. Without ``--question`` questions are read from the terminal, line by line, and answered with what was said
before in mind; Ctrl-D or Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from framestream.pipeline.tokenization.chat_template import MARK
from framestream.trainer.inference.chat_session import ChatSession, stream_text
from framestream.trainer.inference.contact_sheet import write_contact_sheet
from framestream.trainer.inference.generate import Sampling
from framestream.trainer.inference.predictor import Predictor, resolve_run
from framestream.trainer.weights.tensor_files import WeightsError


class ChatError(Exception):
    """Options that do not fit; one line with the fix."""


class Chat:
    """A conversation about ``files``.

    Raises:
        MediaError: a file cannot be used; one line that names it.
    """

    def __init__(self, asker: Predictor, files: list[MediaFile], tokens: int, sampling: Sampling) -> None:
        self._asker, self._files = asker, files
        self._talk = ChatSession(asker.model, tokens, asker.tokenizer.eos_token_id, sampling)
        self._turns: list[dict[str, str]] = []

    def ask(self, question: str) -> Iterator[str]:
        """The answer, piece by piece."""
        marks = "" if self._turns else f"{MARK}\n" * len(self._files)
        turns = [*self._turns, {"from": "human", "value": marks + question.replace(MARK, "")}]
        said = ""
        for piece in stream_text(self._talk.answer(self._asker.prompt(turns, self._files)), self._asker.text):
            said += piece
            yield piece
        self._turns = [*turns, {"from": "gpt", "value": said}]

    def shown(self) -> tuple[list, list[str]]:
        """The pictures that the model sees, uint8 (S, S, 3) each, and the second or the file that each is of."""
        turn = {"from": "human", "value": f"{MARK}\n" * len(self._files)}
        row, views = self._asker.prompt([turn], self._files), self._asker.views(self._files)
        seconds = [self._asker.seconds(self._files, view) for view in views if view.kind == "video"]
        words = [f"{second:.1f} s" for shown in seconds for second in shown]
        for view, file in zip(views, self._files, strict=True):
            words += [f"{Path(file.path).name} {tile + 1}/{view.tiles}" for tile in range(view.tiles)]
        return [*row.clips.flatten(0, 1).cpu().numpy(), *row.image_tiles.cpu().numpy()], words


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.chat") -> int:
    """Command line; returns the exit status (0 done, 1 a file or weights that cannot be read, 2 bad input, 130
    Ctrl-C)."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="a finished run, or a folder of weights")
    parser.add_argument("--manifest", help="the stage's YAML; the run's own if not given")
    parser.add_argument("--video", action="append", default=[], help="a video, GIF or folder of frames; repeatable")
    parser.add_argument("--start", type=float, help="second at which a clip of the video begins")
    parser.add_argument("--end", type=float, help="second at which it ends")
    parser.add_argument("--image", action="append", default=[], help="a picture, shown after the videos; repeatable")
    parser.add_argument("--question", help="ask this and stop; interactive if not given")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of an answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="draw tokens at this temperature; 0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this probability")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--sheet", type=Path, help="write the pictures that the model sees to this JPEG or PNG")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    options = parser.parse_args(arguments)
    try:
        _check(options)
        weights, manifest = resolve_run(options.checkpoint, options.manifest, options.set)
        files = [MediaFile(path, options.start, options.end) for path in options.video]
        files += [MediaFile(path, reader=IMAGE_READER) for path in options.image]
        sampling = Sampling(options.temperature, options.top_p, options.seed)
        chat = Chat(Predictor(weights, manifest), files, options.max_new_tokens, sampling)
        if options.sheet:
            try:
                write_contact_sheet(options.sheet, *chat.shown())
            except OSError as error:
                raise ChatError(f"--sheet {options.sheet}: cannot be written ({error.strerror})") from None
        _converse(chat, options.question)
    except KeyboardInterrupt:
        print()
        return 130
    except (ChatError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MediaError, WeightsError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check(options: argparse.Namespace) -> None:
    if (options.start is not None or options.end is not None) and len(options.video) != 1:
        raise ChatError("--start and --end are of one --video; give one")
    if options.sheet and not (options.video or options.image):
        raise ChatError("--sheet shows pictures; give a --video or an --image")
    if options.sheet and options.sheet.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise ChatError(f"--sheet {options.sheet}: name a .jpg or a .png file")
    if options.question is not None and not options.question.strip():
        raise ChatError("--question is empty; leave it out to be asked for questions")
    if options.temperature < 0 or not 0 < options.top_p <= 1 or options.max_new_tokens < 1:
        raise ChatError("--temperature is at least 0, --top-p above 0 and at most 1, --max-new-tokens at least 1")


def _converse(chat: Chat, question: str | None) -> None:
    """Print the answer to ``question``, or to every line that is typed."""
    while True:
        if question is None:
            try:
                asked = input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                print()
                return
        else:
            asked = question
        if asked:
            try:
                for piece in chat.ask(asked):
                    print(piece, end="", flush=True)
            except ValueError as error:
                if question is not None:
                    raise
                print(f"error: {error}", file=sys.stderr)
            print()
        if question is not None:
            return


if __name__ == "__main__":
    sys.exit(main())
