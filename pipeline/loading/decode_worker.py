"""A decoding process: tasks arrive over a socket, pixels go into memory that the parent shares.

:class:`framestream.pipeline.loading.decode_processes.ProcessDecoder` starts it with the file descriptor of the socket
and the parent's process id as arguments, and the manifest on standard input. Each message from the parent is a task,
with the descriptor of its buffer if that is new. The process ends when the socket or the parent does. A stuck thread
does not delay that.
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
from typing import Any

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import from_dict
from framestream.pipeline.loading.decode_processes import MAX_MESSAGE
from framestream.pipeline.loading.decode_threads import DecodeItem, DecodeTask, ThreadDecoder
from framestream.pipeline.planning.dataset import open_media_reader
from framestream.pipeline.shards.media_view import MediaView

TICK = 1.0  #: seconds between messages that show that the process is alive


def main(arguments: list[str]) -> None:
    """Serve until the parent is gone."""
    # Launchers send these signals to all processes of a rank, which still needs its rows until it has saved.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    channel, parent = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    try:
        _serve(channel, parent)
    except Exception as error:
        _send(channel, error=_error_line(error))
    finally:
        sys.stderr.flush()
        os._exit(0)  # without waiting for threads, which may be stuck


def _serve(channel: socket.socket, parent: int) -> None:
    manifest = from_dict(Manifest, json.load(sys.stdin), "manifest")
    source = open_media_reader(manifest)
    decoder = ThreadDecoder(source, manifest.loader.threads, manifest.loader.read_timeout)
    _send(channel)
    buffers: dict[int, mmap.mmap] = {}
    checked, poll = time.monotonic(), select.poll()  # select() only takes file descriptors below 1024
    poll.register(channel, select.POLLIN)
    while os.getppid() == parent:
        if poll.poll(1000 * TICK):
            data, descriptors, *_ = socket.recv_fds(channel, MAX_MESSAGE, 1)
            if not data:
                return
            decoder.submit(_to_task(json.loads(data), descriptors, buffers, channel))
        if time.monotonic() - checked >= TICK:
            decoder.raise_if_failed()
            _send(channel)
            checked = time.monotonic()


def _to_task(
    message: dict[str, Any], descriptors: list[int], buffers: dict[int, mmap.mmap], channel: socket.socket
) -> DecodeTask:
    for number in message["unused"]:
        buffers.pop(number, None)
    number = message["buffer"]
    for descriptor in descriptors:
        buffers[number] = mmap.mmap(descriptor, 0)
        os.close(descriptor)
    shape = tuple(message["shape"])
    pixels = np.frombuffer(buffers[number], dtype=np.uint8, count=int(np.prod(shape))).reshape(shape)
    items = [DecodeItem(_to_view(item["view"]), 0, item["offset"], item["count"], 0) for item in message["items"]]

    def done(task: DecodeTask) -> None:
        if task.error:
            _send(channel, error=_error_line(task.error))
        else:
            _send(channel, task=message["task"], failed=task.failed, stuck=task.stuck)

    return DecodeTask(items, pixels, None, done)


def _error_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, OSError | ValueError):  # their text is complete
        return text
    traceback.print_exception(error)
    return f"{type(error).__name__}: {text}"


def _to_view(fields: dict[str, Any]) -> MediaView:
    return MediaView(**{**fields, "frame_indices": np.array(fields["frame_indices"], dtype=np.int64)})


def _send(channel: socket.socket, **message: object) -> None:
    with contextlib.suppress(OSError):  # the parent is gone, which ends the loop that reads
        channel.send(json.dumps(message).encode())
