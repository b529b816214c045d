"""A decoding process: tasks come over a socket, pixels go into memory that the parent shares.

Started by :class:`framestream.pipeline.loading.decode_processes.Processes` with the number of the socket and the parent's process number, and the
manifest on standard input. Messages are tasks, each with the descriptor of its buffer where that is new. It ends when
the socket does, or the parent: a stuck thread does not keep it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import sys
import time
import traceback

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import from_dict
from framestream.pipeline.loading.decode_processes import MESSAGE
from framestream.pipeline.loading.decode_threads import DecodeItem, DecodeTask, ThreadDecoder
from framestream.pipeline.planning.dataset import open_media_reader
from framestream.pipeline.shards.media_view import MediaView

TICK = 1.0  #: seconds between signs of life


def main(arguments: list[str]) -> None:
    """Serve until the parent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # launchers send them to all processes of a rank,
        signal.signal(number, signal.SIG_IGN)  # which still needs its rows until it has saved
    channel, parent = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    try:
        _serve(channel, parent)
    except Exception as error:
        _say(channel, error=_line(error))
    finally:
        sys.stderr.flush()
        os._exit(0)  # without waiting for threads, which may be stuck


def _serve(channel: socket.socket, parent: int) -> None:
    manifest = from_dict(Manifest, json.load(sys.stdin), "manifest")
    source = open_media_reader(manifest)
    threads = ThreadDecoder(source, manifest.loader.threads, manifest.loader.read_timeout)
    _say(channel)
    memory: dict[int, mmap.mmap] = {}
    checked, poll = time.monotonic(), select.poll()  # not select(), which takes descriptors below 1024 alone
    poll.register(channel, select.POLLIN)
    while os.getppid() == parent:
        if poll.poll(1000 * TICK):
            data, files, *_ = socket.recv_fds(channel, MESSAGE, 1)
            if not data:
                return
            threads.submit(_task(json.loads(data), files, memory, channel))
        if time.monotonic() - checked >= TICK:
            threads.raise_if_failed()
            _say(channel)
            checked = time.monotonic()


def _task(message: dict, files: list[int], memory: dict[int, mmap.mmap], channel: socket.socket) -> DecodeTask:
    for number in message["gone"]:
        memory.pop(number, None)
    number = message["buffer"]
    for descriptor in files:
        memory[number] = mmap.mmap(descriptor, 0)
        os.close(descriptor)
    shape = tuple(message["shape"])
    pictures = np.frombuffer(memory[number], dtype=np.uint8, count=int(np.prod(shape))).reshape(shape)
    items = [DecodeItem(_view(item["view"]), 0, item["at"], item["count"], 0) for item in message["items"]]

    def done(task: DecodeTask) -> None:
        if task.error:
            _say(channel, error=_line(task.error))
        else:
            _say(channel, task=message["task"], failed=task.failed, stuck=task.stuck)

    return DecodeTask(items, pictures, None, done)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError):  # which say it all
        return text
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"


def _view(fields: dict) -> MediaView:
    return MediaView(**{**fields, "places": np.array(fields["places"], dtype=np.int64)})


def _say(channel: socket.socket, **message: object) -> None:
    with contextlib.suppress(OSError):  # the parent is gone, which ends the loop that reads
        channel.send(json.dumps(message).encode())
