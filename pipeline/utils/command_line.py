"""What all command lines share: options that are checked, and an end without a traceback.

@run_safely(stopped="Stopped. Nothing was written.")
def main(arguments: Sequence[str] | None = None, prog: str = "verify_shards") -> int:
    parser = CommandParser(prog=prog, description="Check a shard root.")
    parser.add_argument("--workers", type=integer_option(1, 1024), default=4)
    ...
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import math
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from framestream.pipeline.utils.paths import PathError, expand_path, is_address

EXIT_STOPPED = 130  #: stopped by Ctrl-C: 128 + SIGINT
EXIT_CLOSED = 141  #: nothing reads the output any more: 128 + SIGPIPE
MAX_COUNT = 2**31 - 1  #: largest value of an option that counts something
MAX_LISTED = 12  #: options of a command that a message lists; ``--help`` lists more
NEAR = 0.65  #: least similarity of two names that may be mistaken for each other

Main = Callable[..., int]


def run_safely(stopped: str = "stopped", docstrings: bool = False) -> Callable[[Main], Main]:
    """Make a decorator of a command's ``main``, after which no ordinary failure ends in a traceback.

    Characters that the terminal's encoding lacks are written as escapes. Ctrl-C prints ``stopped`` and returns 130. If
    nothing reads the output any more (``| head``), the command ends quietly with 141. An error of the file system or of
    memory that the command did not handle is one line, and the status is 1.

    Args:
        stopped: what to print after Ctrl-C.
        docstrings: whether the command uses transformers, whose models cannot be imported without docstrings.
    """

    def decorate(main: Main) -> Main:
        @functools.wraps(main)
        def run(*args: Any, **kwargs: Any) -> int:
            for stream in (sys.stdout, sys.stderr):
                if hasattr(stream, "reconfigure"):
                    stream.reconfigure(errors="backslashreplace")
            if docstrings and sys.flags.optimize > 1:
                return _report("error: python -OO removes docstrings, which transformers needs; run without -OO", 2)
            try:
                try:
                    status = main(*args, **kwargs)
                except SystemExit:
                    _flush()
                    raise
                _flush()
                return status
            except KeyboardInterrupt:
                return _report(stopped, EXIT_STOPPED)
            except BrokenPipeError as error:
                if _discard_closed_streams():
                    return EXIT_CLOSED
                return _report(f"error: {describe_os_error(error)}", 1)
            except OSError as error:
                _discard_closed_streams()  # standard output may be on a full disk
                return _report(f"error: {describe_os_error(error)}", 1)
            except MemoryError as error:
                reason = str(error) or "out of memory"
                return _report(f"error: not enough memory ({reason}); use a machine with more", 1)

        return run

    return decorate


def describe_os_error(error: OSError) -> str:
    """Return an error of the file system as one line, with the name of the file if it is known."""
    reason = " ".join(str(error.strerror or error).split()) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename is not None else reason


def printable_line(text: str, limit: int = 100) -> str:
    """Make one line of at most ``limit`` characters of a text from a file, for messages; others become ``?``."""
    line = re.sub(r"[^\x20-\x7e]+", "?", text)
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            stream.flush()


def _report(line: str, status: int) -> int:
    """Print ``line`` to standard error, which may be closed, and return ``status``."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    _discard_closed_streams()
    return status


def _discard_closed_streams() -> bool:
    """Point each standard stream that cannot be written to os.devnull; returns whether nothing reads one of them.

    Otherwise the interpreter would fail to write the rest when it exits.
    """
    unread = False
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:
            continue
        broken = False
        try:
            stream.flush()
        except OSError:
            broken = True
        with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
            ends = select.poll()
            ends.register(stream.fileno(), 0)
            unread |= (closed := bool(ends.poll(0)))  # POLLERR: the reader of a pipe is gone
            if closed or broken:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)
    return unread


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and status 2, and which takes no abbreviations.

    For an option that does not exist it names the nearest one, or says that its argument needs no option.
    """

    def __init__(self, *, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line. An unknown option is an error before missing ones are."""
        arguments = list(sys.argv[1:] if args is None else args)
        for argument in arguments[: arguments.index("--")] if "--" in arguments else arguments:
            name = argument.partition("=")[0]
            if name.startswith("--") and " " not in argument and name not in self._option_string_actions:
                self.error(f"unknown option {name}{self._hint(name)}")
        return super().parse_args(arguments, namespace)

    def _hint(self, name: str) -> str:
        """Return how to write what an unknown option means, as the end of a message."""
        word = name.removeprefix("--").replace("-", "_")
        if any(action.dest == word and not action.option_strings for action in self._actions):
            return f"; name the {word.replace('_', ' ')} without an option: {self.prog} {word.upper()}"
        options = [item for item in self._option_string_actions if item not in ("--help", "-h")]
        if len(options) > MAX_LISTED and not near_name(name, options):
            return ""
        return nearest_name(name, options)

    def error(self, message: str) -> NoReturn:
        """Print an error of the command line as one line, and exit."""
        self.exit(2, f"error: {' '.join(message.split())}; {self.prog} --help lists the options\n")


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ``; did you mean NAME?`` with the nearest of ``known``, or ``; known: ...`` if none is near."""
    names = list(known)
    near = near_name(name, names)
    return f"; did you mean {near}?" if near else f"; known: {', '.join(names)}"


def near_name(name: str, known: Iterable[str], least: float = NEAR) -> str:
    """Return the nearest of ``known`` names, empty if none is near; the dashes before a name do not count.

    Args:
        least: the least similarity of a near name, from 0 to 1.
    """
    names = {item.lstrip("-"): item for item in known}
    near = difflib.get_close_matches(name.lstrip("-"), names, n=1, cutoff=least)
    return names[near[0]] if near else ""


def integer_option(low: int, high: int = MAX_COUNT) -> Callable[[str], int]:
    """Make the ``type`` of an option that is a whole number from ``low`` to ``high``."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdigit() and len(digits) < 20 else None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a whole number from {low:,} to {high:,}, not {text!r:.40}")
        return value

    return parse


def number_option(low: float, high: float, above: bool = False) -> Callable[[str], float]:
    """Make the ``type`` of an option that is a number from ``low`` to ``high``, without ``low`` if ``above``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high or (above and value == low):
            lowest = f"above {low:g}, at most" if above else f"from {low:g} to"
            raise argparse.ArgumentTypeError(f"must be a number {lowest} {high:,g}, not {text!r:.40}")
        return value

    return parse


def path_option(text: str) -> Path:
    """Read the value of an option that is a path on this machine. Its ``~`` and its variables are expanded."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text:.200} is an address; give a path on this machine")
    return Path(name_option(text))


def name_option(text: str) -> str:
    """Read the value of an option that is a path, an address or a name; paths are expanded, addresses stay."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    try:
        return expand_path(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
