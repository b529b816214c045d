"""Run each reader in a new process: count the bytes it reads from a cold disk, and media a second over a slow line."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.loading.media import BenchmarkMedia
from benchmarks.loading.readers import Reader, by_offset, peer, peer_module, pixels, write_peer

OURS = "framestream"
SECONDS = 1.0  #: minimum time that a reader is timed for over a slow line
THREADS = 16  #: media that are read at once over a slow line, by readers that open single media


def bytes_read(name: str, media: BenchmarkMedia, count: int) -> int:
    """Return the bytes that the process read from disk for ``count`` frames of every medium, its index included.

    A peer's own format is written before, and the media are dropped from the page cache.
    """
    if name != OURS:
        _run_isolated(write_peer, name, media)
    return _run_isolated(_cold, name, media, count)


def media_rate(name: str, media: BenchmarkMedia, count: int, address: str) -> tuple[float, int]:
    """Return media a second with ``count`` frames each, over complete passes of at least ``SECONDS`` together.

    Each pass opens the data set again with empty caches, which is not timed. The first pass, which loads libraries and
    opens connections, is not timed either. The second value is the media that were read in all passes.
    """
    return _run_isolated(_remote, name, media, count, address)


def _cold(name: str, media: BenchmarkMedia, count: int) -> int:
    for path in media.folder.rglob("*"):
        if path.is_file():
            _drop_from_page_cache(path)
    before = _disk_bytes()
    _read(_open(name, media), count, media.count)
    return _disk_bytes() - before


def _remote(name: str, media: BenchmarkMedia, count: int, address: str) -> tuple[float, int]:
    passes = [_timed_pass(name, media, count, address)]
    while sum(passes[1:]) < SECONDS:
        passes.append(_timed_pass(name, media, count, address))
    return media.count * len(passes[1:]) / sum(passes[1:]), media.count * len(passes)


def _timed_pass(name: str, media: BenchmarkMedia, count: int, address: str) -> float:
    with tempfile.TemporaryDirectory(dir=media.folder) as tempfile.tempdir:  # for copies
        read = _open(name, media, address)
        started = time.perf_counter()
        _read(read, count, media.count)
        return time.perf_counter() - started


def _open(name: str, media: BenchmarkMedia, address: str | None = None) -> Reader:
    if name != OURS:
        return peer(name, media, by_offset, address, 0 if address is None else THREADS)
    return pixels(media) if address is None else pixels(media, THREADS, address)


def _read(reader: Reader, count: int, media: int) -> None:
    frames = sum(len(array) for array in reader(count))
    if frames != count * media:
        raise RuntimeError(f"{frames} frames were read, not {count * media}")


def _drop_from_page_cache(path: Path) -> None:
    """Drop a file from the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_bytes() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def _run_isolated(work: Callable[..., Any], name: str, *arguments: Any) -> Any:
    """Return the result of ``work``, run in a new process after its imports."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(theirs, work, name, *arguments))
    process.start()
    theirs.close()
    try:
        result = ours.recv()
    except EOFError:
        raise RuntimeError(f"{name}: its process ended with exit code {process.join() or process.exitcode}") from None
    process.kill()  # some peers start threads that never end
    process.join()
    return result


def _call(pipe: Connection, work: Callable[..., Any], name: str, *arguments: Any) -> None:
    quiet()
    if name != OURS:
        peer_module(name)
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[variable]
    pipe.send(work(name, *arguments))


def quiet() -> None:
    """Suppress warnings of peers about missing accelerators."""
    warnings.filterwarnings("ignore", message="'pin_memory' argument")
