"""Measure ranged reads over HTTP: clients, numbers of threads, and the gap at which two ranges share a request.

    python -m benchmarks.loading.remote

The server runs in another process on the same machine, answers after 20 ms and sends at most 1 Gbit/s.
"""

from __future__ import annotations

import argparse
import http.client
import queue
import resource
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import urllib3

from benchmarks.loading.slow_server import SlowServer
from framestream.pipeline.storage import ShardRef, open_storage

FRAME = 18_000  #: bytes of a JPEG of 224 pixels
SIZE = 64 << 20  #: bytes of the file
DELAY, RATE = 0.02, 1e9 / 8  #: seconds, bytes a second
CLIENT_THREADS = 64

Read = Callable[[int, int], object]  #: offset, size


def with_http_client(url: str) -> Read:
    """Return a function that reads a range over one connection."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port)

    def read(offset: int, size: int) -> bytes:
        connection.request("GET", parts.path, headers={"Range": f"bytes={offset}-{offset + size - 1}"})
        return connection.getresponse().read()

    return read


def with_urllib3(url: str, pool: urllib3.PoolManager) -> Read:
    """Return a function that reads a range through the pool, which all threads share."""
    return lambda offset, size: pool.request("GET", url, headers={"Range": f"bytes={offset}-{offset + size - 1}"}).data


def with_httpx2(url: str, client: httpx2.Client) -> Read:
    """Return a function that reads a range through the client, which all threads share."""
    return lambda offset, size: client.get(url, headers={"Range": f"bytes={offset}-{offset + size - 1}"}).content


def run(calls: int, threads: int, make: Callable[[], Callable[[int], object]]) -> tuple[float, float]:
    """Return elapsed and processor seconds of this process for ``calls`` numbered calls by ``threads`` threads."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(calls):
        left.put(number)

    def work() -> None:
        call = make()
        while not left.empty():
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            call(number)

    workers = [threading.Thread(target=work) for _ in range(threads)]
    before, begun = processor_time(), time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begun, processor_time() - before


def processor_time() -> float:
    """Return seconds of processor time of all threads of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def offset_of(number: int) -> int:
    """Return the offset for call ``number``; offsets are spread over the file."""
    return number * 7_919_000 % (SIZE - (8 << 20))


def clients(url: str, requests: int) -> Iterator[str]:
    """Yield a table row for each client: requests of one frame."""
    pool = urllib3.PoolManager(maxsize=CLIENT_THREADS)
    limits = httpx2.Limits(max_connections=CLIENT_THREADS, max_keepalive_connections=CLIENT_THREADS)
    with httpx2.Client(limits=limits) as client:
        for name, make in {
            "http.client": lambda: with_http_client(url),
            "urllib3": lambda: with_urllib3(url, pool),
            "httpx2": lambda: with_httpx2(url, client),
        }.items():

            def calls(make: Callable[[], Read] = make) -> Callable[[int], object]:
                read = make()
                return lambda number: read(offset_of(number), FRAME)

            seconds, used = run(requests, CLIENT_THREADS, calls)
            yield f"| {name} | {requests / seconds:,.0f} | {1000 * used / requests:.2f} |"


def reads(url: str, media: int) -> Iterator[str]:
    """Yield a table row for each number of threads: reads of four distant frames of a medium through the storage."""
    base, _, name = url.rpartition("/")
    storage, shard = open_storage(base), ShardRef(name, SIZE, "")
    for threads in (1, 2, 4, 8, 16, 32):
        seconds, used = run(
            media,
            threads,
            lambda: lambda number: storage.read(shard, [(offset_of(number) + k * (2 << 20), FRAME) for k in range(4)]),
        )
        yield f"| {threads} | {media / seconds:,.0f} | {4 * media / seconds:,.0f} | {1000 * used / media:.2f} |"


def gap(url: str, calls: int) -> str:
    """Return the fixed cost of a request at full load, as the equal number of bytes of a long request."""
    base, _, name = url.rpartition("/")
    storage, shard, long = open_storage(base), ShardRef(name, SIZE, ""), 1 << 20
    frame, _ = run(calls, CLIENT_THREADS, lambda: lambda number: storage.read(shard, [(offset_of(number), FRAME)]))
    large, _ = run(calls // 8, CLIENT_THREADS, lambda: lambda number: storage.read(shard, [(offset_of(number), long)]))
    each, byte = frame / calls, large / (calls // 8) / long
    saved = f"{1e-3 * (each / byte - FRAME):,.0f} kB of a request of 1 MiB"
    return f"a request of {FRAME // 1000} kB takes {1e3 * each:.2f} ms; beyond its bytes it costs as much as {saved}"


def main() -> None:
    """Print the three measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=4000, help="requests of each row")
    requests = parser.parse_args().requests
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.tar"
        path.write_bytes(bytes(SIZE))
        with SlowServer(Path(folder), DELAY, RATE) as server:
            address = server.address
            print("| client, 64 threads | requests/s | processor ms a request |\n| --- | --- | --- |")
            for row in clients(f"{address}/file.tar", requests):
                print(row, flush=True)
            print("\n| threads | media/s | ranges/s | processor ms a medium |\n| --- | --- | --- | --- |")
            for row in reads(f"{address}/file.tar", max(requests // 4, 1)):
                print(row, flush=True)
            print("\n" + gap(f"{address}/file.tar", max(requests, 8)))


if __name__ == "__main__":
    main()
