"""A web server for benchmarks, in a process of its own: ranges of files, after a delay, within a bandwidth."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import re
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

CHUNK = 1 << 16  #: bytes that the bandwidth is shared out by
HEAD = (
    "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nContent-Range: bytes {first}-{last}/{size}\r\n"
    'ETag: "{size}"\r\nAccept-Ranges: bytes\r\nContent-Type: application/octet-stream\r\n\r\n'
)


@contextlib.contextmanager
def slow_server(files: Mapping[str, Path], delay: float, bits_per_second: float) -> Iterator[str]:
    """The address of a server of ``files`` (by path, with a leading slash) until the end of the block.

    Args:
        delay: seconds before each answer.
        bits_per_second: of all answers together; 0 for no bound.
    """
    ours, theirs = multiprocessing.Pipe()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_run, args=(theirs, dict(files), delay, bits_per_second), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.kill()
        process.join()


def _run(pipe: Connection, files: dict[str, Path], delay: float, bits_per_second: float) -> None:
    asyncio.run(_serve(pipe, {name: path.read_bytes() for name, path in files.items()}, delay, bits_per_second / 8))


async def _serve(pipe: Connection, files: dict[str, bytes], delay: float, rate: float) -> None:
    loop, free = asyncio.get_running_loop(), 0.0  # when the line is free again

    async def send(writer: asyncio.StreamWriter, data: memoryview) -> None:
        nonlocal free
        for start in range(0, len(data), CHUNK):
            part = data[start : start + CHUNK]
            if rate:
                free = max(free, loop.time()) + len(part) / rate
                if (wait := free - loop.time()) > 0.001:
                    await asyncio.sleep(wait)
            writer.write(part)
            await writer.drain()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                await asyncio.sleep(delay)
                data = files.get(head.split(" ", 2)[1])
                if data is None:
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                asked = re.search(r"^range: bytes=(\d+)-(\d*)", head, re.I | re.M)
                first, last = (int(asked[1]), int(asked[2] or len(data))) if asked else (0, len(data))
                last = min(last, len(data) - 1)
                facts = {"length": last + 1 - first, "first": first, "last": last, "size": len(data)}
                writer.write(HEAD.format(status="206 Partial Content" if asked else "200 OK", **facts).encode())
                if not head.startswith("HEAD"):
                    await send(writer, memoryview(data)[first : last + 1])
        writer.close()

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
