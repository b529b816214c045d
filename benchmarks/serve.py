"""Load ``trainer.serve`` with 1, 8 and 64 clients, and the same model one request at a time, in one run.

    python -m benchmarks.serve --checkpoint demo/runs/stage4 \\
        --video demo/data/media/heldout/heldout-order-0000.mp4 --video demo/data/media/heldout/heldout-count-0000.mp4

Every client asks about one of the videos after the other, reads the streamed answer, and asks again. The server is a
process of its own, with kept visual tokens and without (``--cache-mb 0``; it then keeps the sampled frames as JPEGs, so
its tower runs for every question and its video decoder does not). One by one, the model is called from Python for the
same questions, also with its tower's tokens kept and not. The table has requests/s, and median and 95th percentile of
the seconds to the first token.

Then 200 clients ask for two minutes. Each answer must be complete, or the documented refusal (429), and the server's
memory must stay: its largest size in the last quarter is at most 5 % above that in the second quarter. Otherwise the
status is 1. Clients and server share the machine's cores. Leave it idle: these are times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from framestream.pipeline.shards.memory_index import MediaFile
from framestream.trainer.inference.generation import decode_steps, prefill
from framestream.trainer.inference.predictor import Predictor, resolve_run
from framestream.trainer.inference.vision_cache import VisionFeatureCache

CHAT = "/v1/chat/completions"
QUESTION = "What happens in the video?"
REFUSED = 429  #: the documented refusal
LARGEST_GROWTH = 1.05  #: of the server's memory, from the second quarter to the last
MIB = 1 << 20
TOKEN = re.compile(r'"content":"(?!")|"finish_reason":"')  #: in the first event with a token, or with the end


@dataclass
class LoadResult:
    """What the clients of one load saw."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    first_tokens: list[float] = field(default_factory=list)  #: seconds from a request to its first token
    broken: list[str] = field(default_factory=list)  #: answers that are not complete, one line each

    @property
    def rate(self) -> float:
        """Complete answers a second."""
        return len(self.first_tokens) / self.seconds


@contextlib.contextmanager
def running_server(checkpoint: Path, *words: str) -> Iterator[tuple[str, int]]:
    """Start the server; yield its address and its process id."""
    command = [sys.executable, "-m", "trainer.serve", str(checkpoint), "--port", "0", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        if found is None:
            raise SystemExit("error: trainer.serve did not start; its message is above")
        yield found[0], process.pid
    finally:
        process.terminate()
        process.wait(60)


def upload(url: str, videos: Sequence[Path]) -> list[str]:
    """Upload files; return their ids."""
    numbers = []
    for video in videos:
        with open(video, "rb") as file:
            response = httpx2.post(f"{url}/v1/files", files={"file": (video.name, file)}, timeout=60, trust_env=False)
        numbers.append(response.raise_for_status().json()["id"])
    return numbers


def ask_once(url: str, number: str) -> None:
    """Ask about an upload, so that it is decoded before anything is measured."""
    name = httpx2.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"]
    content = [{"type": "file", "file": {"file_id": number}}, {"type": "text", "text": QUESTION}]
    body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    httpx2.post(f"{url}{CHAT}", json=body, timeout=120, trust_env=False).raise_for_status()


@dataclass(frozen=True)
class Load:
    """What all clients of one load do."""

    url: str
    numbers: Sequence[str]  #: ids of the uploads that they ask about
    clients: int
    seconds: float
    tokens: int  #: longest answer


async def run_load(load: Load, result: LoadResult) -> None:
    """Ask with all clients at the same time until the time is over. They share a pool of as many connections."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(base_url=load.url, timeout=120, trust_env=False, limits=limits) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        started = time.perf_counter()
        ends = started + load.seconds
        await asyncio.gather(*(ask_until(ends, client, name, load, first, result) for first in range(load.clients)))
        result.seconds = time.perf_counter() - started


async def ask_until(
    ends: float, client: httpx2.AsyncClient, name: str, load: Load, first: int, result: LoadResult
) -> None:
    """Be one client: ask, read the answer, and ask again."""
    turn = first
    while time.perf_counter() < ends:
        file = {"type": "file", "file": {"file_id": load.numbers[turn % len(load.numbers)]}}
        message = {"role": "user", "content": [file, {"type": "text", "text": f"{QUESTION} ({turn})"}]}
        body = {"model": name, "messages": [message], "max_tokens": load.tokens, "stream": True}
        turn += 1
        started, first_token, last = time.perf_counter(), 0.0, ""
        try:
            async with client.stream("POST", CHAT, json=body) as response:
                result.statuses[response.status_code] += 1
                async for line in response.aiter_lines():
                    if not first_token and TOKEN.search(line):
                        first_token = time.perf_counter() - started
                    last = line or last
                if response.status_code == REFUSED:
                    await asyncio.sleep(min(float(response.headers["retry-after"]), 1.0))
                elif response.status_code != 200 or last != "data: [DONE]" or not first_token:
                    result.broken.append(f"{response.status_code}: {last[:200]}")
                else:
                    result.first_tokens.append(first_token)
        except httpx2.HTTPError as error:
            result.broken.append(f"{type(error).__name__}: {error}")


def measure_load(load: Load) -> LoadResult:
    """Run a load; return what its clients saw."""
    result = LoadResult()
    asyncio.run(run_load(load, result))
    return result


def ask_one_by_one(checkpoint: Path, videos: Sequence[Path], kept: bool, seconds: float, tokens: int) -> LoadResult:
    """Call the model from Python, one question at a time; ``kept`` keeps the tower's tokens between questions."""
    predictor, result = Predictor(*resolve_run(checkpoint)), LoadResult()
    model, ends = predictor.model, predictor.chat_template.end_ids
    if kept:
        predictor.encode = VisionFeatureCache(model.vision_tower, predictor.device)
    started, turn = time.perf_counter(), 0
    while time.perf_counter() < started + seconds:
        asked = time.perf_counter()
        turns = [{"from": "human", "value": f"<image>\n{QUESTION} ({turn})"}]
        prompt = predictor.build_prompt(turns, [MediaFile(videos[turn % len(videos)])])
        steps = decode_steps(model, *prefill(model, [prompt]), prompt.keys, tokens, ends)
        next(steps)
        result.first_tokens.append(time.perf_counter() - asked)
        for _ in steps:
            pass
        result.statuses[200] += 1
        turn += 1
    result.seconds = time.perf_counter() - started
    return result


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process and of its children."""
    total = 0
    for number in [process, *_children(process)]:
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{number}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def _children(process: int) -> list[int]:
    found = []
    for file in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(word) for word in file.read_text().split()]
    return found


async def watch_memory(process: int, sizes: list[int]) -> None:
    """Add the size of a process to ``sizes`` every half second, until cancelled."""
    while True:
        sizes.append(resident_bytes(process))
        await asyncio.sleep(0.5)


def soak(load: Load, process: int) -> bool:
    """Run a load; print what its clients saw, and return whether nothing was wrong.

    Args:
        process: id of the server.
    """
    result, sizes = LoadResult(), list[int]()

    async def run() -> None:
        watching = asyncio.ensure_future(watch_memory(process, sizes))
        await run_load(load, result)
        watching.cancel()

    asyncio.run(run())
    quarter = max(len(sizes) // 4, 1)
    second, last = max(sizes[quarter : 2 * quarter] or sizes), max(sizes[-quarter:])
    others = {status: n for status, n in result.statuses.items() if status not in (200, REFUSED)}
    print(
        f"\n{load.clients} clients for {result.seconds:.0f} s: {result.statuses[200]} answers ({result.rate:.1f}/s), ",
        end="",
    )
    print(f"{result.statuses[REFUSED]} refused with {REFUSED}, {len(result.broken)} errors; ", end="")
    print(f"memory of the server {second / MIB:.0f} MiB in the second quarter, {last / MIB:.0f} MiB in the last")
    for line in [*map(str, others), *result.broken][:10]:
        print(f"error: {line}", file=sys.stderr)
    if last > LARGEST_GROWTH * second:
        print(f"error: the server's memory grew by {last / second - 1:.1%}", file=sys.stderr)
    return bool(result.first_tokens) and not others and not result.broken and last <= LARGEST_GROWTH * second


def _row(way: str, clients: int, result: LoadResult) -> str:
    times = sorted(result.first_tokens)
    median, high = statistics.median(times), times[min(int(0.95 * len(times)), len(times) - 1)]
    refused = result.statuses[REFUSED]
    return f"| {way} | {clients} | {result.rate:.1f} | {median:.3f} s | {high:.3f} s | {len(times)} | {refused} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a finished run, or a folder of weights")
    parser.add_argument("--video", type=Path, action="append", required=True, help="repeatable")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each load")
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--soak-clients", type=int, default=200)
    parser.add_argument("--soak-seconds", type=float, default=120.0)
    options = parser.parse_args(arguments)
    print("| way | clients | requests/s | first token, median | first token, 95 % | answers | refused |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    sound = True
    for kept, name in ((True, "kept"), (False, "not kept")):
        result = ask_one_by_one(options.checkpoint, options.video, kept, options.seconds, options.tokens)
        print(_row(f"one by one, tokens {name}", 1, result), flush=True)
        words = () if kept else ("--cache-mb", "0")
        with running_server(options.checkpoint, *words) as (url, process):
            numbers = upload(url, options.video)
            for number in numbers:
                ask_once(url, number)
            for clients in options.clients:
                result = measure_load(Load(url, numbers, clients, options.seconds, options.tokens))
                print(_row(f"served, tokens {name}", clients, result), flush=True)
                sound &= not result.broken
            if kept:
                last = Load(url, numbers, options.soak_clients, options.soak_seconds, options.tokens)
                sound &= soak(last, process)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
