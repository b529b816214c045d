"""Run a function in a forked process with limits of time and memory, and say how it ended."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.fuzz.target import CommandError, Reading

SECONDS = 20.0  #: after which a process hangs
MAX_BYTES = 2 << 30  #: of memory that a process may take beyond what it started with
ADDRESS_SPACE = 12 << 30  #: bytes beyond what a process starts with; only protects the machine
MAX_OUTPUT = 1 << 16  #: bytes of the output that are kept, from its end


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        reading: what the function returned; None if it did not.
        error: the last line of its exception; empty if it raised no exception.
        expected: whether the exception is one of the project's own, or of the file system.
        trace: where the exception was raised.
        output: the end of standard output and standard error.
        signal: the number of the signal that ended the process, or 0.
        hung: whether it was stopped after ``SECONDS``.
        peak: bytes of memory that it took beyond what it started with.
    """

    reading: Reading | None = None
    error: str = ""
    expected: bool = False
    trace: str = ""
    output: str = ""
    signal: int = 0
    hung: bool = False
    peak: int = 0


def run_isolated(function: Callable[[], Reading], folder: Path, seconds: float = SECONDS) -> Ended:
    """Run ``function`` in a forked process whose current folder is ``folder``."""
    result, output = os.memfd_create("result"), os.memfd_create("output")
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        process = os.fork()
        if not process:
            try:
                _run_child(function, folder, result, output)
            finally:
                os._exit(70)
        hung, status, usage = _wait(process, seconds)
        report = json.loads(_read(result) or b"{}")
        text = _read(output)[-MAX_OUTPUT:].decode(errors="replace")
    finally:
        os.close(result)
        os.close(output)
    peak = max(0, usage.ru_maxrss * 1024 - report.pop("start", 0))
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) and not hung else 0
    reading = report.pop("reading", None)
    if reading is not None:
        reading = Reading(reading["items"], reading["left_out"], tuple(reading["messages"]))
    elif not report.get("error") and not hung and not ended_by:
        report["error"] = f"ended with exit status {os.WEXITSTATUS(status)}"
    return Ended(reading=reading, **report, output=text, signal=ended_by, hung=hung, peak=peak)


def _wait(process: int, seconds: float) -> tuple[bool, int, resource.struct_rusage]:
    """Wait for a process and kill its group; return whether it hung, its status, and what it used."""
    handle = os.pidfd_open(process)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        hung = not poll.poll(seconds * 1000)
    finally:
        os.close(handle)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)
    if hung:
        os.kill(process, signal.SIGKILL)
    _, status, usage = os.wait4(process, 0)
    return hung, status, usage


def _read(descriptor: int) -> bytes:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, size, 0)


def _run_child(function: Callable[[], Reading], folder: Path, result: int, output: int) -> None:
    """Run the function in the forked process, and write a JSON report to ``result``."""
    os.setsid()
    os.chdir(folder)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
    faulthandler.disable()
    pages = Path("/proc/self/statm").read_text().split()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    limit = int(pages[0]) * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    report: dict[str, Any] = {"start": int(pages[1]) * resource.getpagesize()}
    try:
        report["reading"] = asdict(function())
    except BaseException as error:  # whatever ends a command is a result here
        report |= _describe(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os.pwrite(result, json.dumps(report).encode(), 0)
    os._exit(0)


def _describe(error: BaseException) -> Mapping[str, Any]:
    own = type(error).__module__.startswith("framestream.")
    named = isinstance(error, OSError) and error.filename is not None
    text = f"{error}" if own or isinstance(error, CommandError) else f"{type(error).__name__}: {error}"
    trace = "".join(traceback.format_exception(error, limit=-6))
    return {
        "error": text[:8000] or type(error).__name__,
        "trace": trace[-6000:],
        "expected": _is_expected(error, named),
    }


def _is_expected(error: BaseException, named: bool) -> bool:
    return isinstance(error, CommandError) or type(error).__module__.startswith("framestream.") or named
