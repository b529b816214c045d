"""An HTTP server of a folder behind a slow line: every response is delayed, and all share one bandwidth.

``with SlowServer(folder, delay, rate) as server`` runs it in its own process at ``server.address``. It answers GET and
HEAD with complete files or ranges. S3 clients see a bucket of public objects with the folder's name, and list it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import re
import urllib.parse
from email.utils import formatdate
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from xml.sax.saxutils import escape

CHUNK = 1 << 16  #: bytes that a connection sends before others can send
AHEAD = 0.001  #: seconds by which sent data may exceed the bandwidth


class SlowServer:
    """The server's process, and counters of what it sent.

    Args:
        folder: folder to serve.
        delay: seconds from a request to the first byte of its response. A new connection adds the same delay once.
        rate: bytes a second of all connections together.
    """

    def __init__(self, folder: Path, delay: float, rate: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(folder, delay, rate, theirs), daemon=True)
        self._folder = folder

    def __enter__(self) -> SlowServer:
        self._process.start()
        self.address = f"http://127.0.0.1:{self._pipe.recv()}/{self._folder.name}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.join()

    def sent(self) -> tuple[int, int]:
        """Return the requests answered and the bytes of files sent since the last call."""
        self._pipe.send(None)
        return self._pipe.recv()


class _Line:
    """The bandwidth that all connections share."""

    def __init__(self, folder: Path, delay: float, rate: float) -> None:
        self.folder, self.delay, self.rate = folder, delay, rate
        self.requests = self.bytes = 0
        self._free = 0.0  #: time at which everything sent so far has passed the line

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until it closes."""
        now, wait = asyncio.get_running_loop().time, 2 * self.delay
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await asyncio.sleep(wait)
                wait = self.delay
                method, target, _ = head.split(b" ", 2)
                await self._file(method.decode(), target.decode(), head.decode("latin-1"), writer, now)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _file(self, method: str, target: str, head: str, writer: asyncio.StreamWriter, now) -> None:
        self.requests += 1
        parts = urllib.parse.urlsplit(target)
        if "list-type=2" in parts.query:
            prefix = urllib.parse.parse_qs(parts.query).get("prefix", [""])[0]
            text = listing(self.folder, prefix).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text))
            return
        name = urllib.parse.unquote(parts.path).removeprefix(f"/{self.folder.name}/")
        path = self.folder / name
        if ".." in path.parts or not path.is_file():
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            return
        info = path.stat()
        first, last, status = 0, info.st_size - 1, "200 OK"
        if found := re.search(r"^range: *bytes=(\d*)-(\d*)", head, re.I | re.M):
            low, high = found.groups()
            first = int(low) if low else info.st_size - int(high)
            last = min(int(high), last) if low and high else last
            status = "206 Partial Content"
        lines = [
            f"HTTP/1.1 {status}",
            f"Content-Length: {last - first + 1}",
            "Content-Type: application/octet-stream",
            "Accept-Ranges: bytes",
            f'ETag: "{info.st_mtime_ns:x}{info.st_size:x}"',
            f"Last-Modified: {formatdate(info.st_mtime, usegmt=True)}",
            *([f"Content-Range: bytes {first}-{last}/{info.st_size}"] if found else []),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode())
        if method == "HEAD":
            return
        with open(path, "rb") as file:
            for start in range(first, last + 1, CHUNK):
                data = os.pread(file.fileno(), min(CHUNK, last + 1 - start), start)
                self._free = max(now(), self._free) + len(data) / self.rate
                if self._free - now() > AHEAD:
                    await asyncio.sleep(self._free - now())
                writer.write(data)
                self.bytes += len(data)
                await writer.drain()


def listing(folder: Path, prefix: str) -> str:
    """Return the files of ``folder`` whose names begin with ``prefix``, as S3 lists objects (version 2, one page)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    objects = [
        f"<Contents><Key>{escape(name)}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
        f'<ETag>"{path.stat().st_mtime_ns:x}"</ETag><Size>{path.stat().st_size}</Size></Contents>'
        for path in files
        if (name := path.relative_to(folder).as_posix()).startswith(prefix)
    ]
    head = f"<Name>{escape(folder.name)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(objects)}</KeyCount>"
    return f"<ListBucketResult>{head}<IsTruncated>false</IsTruncated>{''.join(objects)}</ListBucketResult>"


def _serve(folder: Path, delay: float, rate: float, pipe: Connection) -> None:
    asyncio.run(_run(_Line(folder, delay, rate), pipe))


async def _run(line: _Line, pipe: Connection) -> None:
    server = await asyncio.start_server(line.answer, "127.0.0.1", 0, limit=CHUNK)

    def report() -> None:
        try:
            pipe.recv()
        except EOFError:  # the process that started the server has ended
            os._exit(0)
        pipe.send((line.requests, line.bytes))
        line.requests = line.bytes = 0

    asyncio.get_running_loop().add_reader(pipe.fileno(), report)
    pipe.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()
