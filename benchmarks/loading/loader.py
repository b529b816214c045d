"""Compare this project's readers with others: speed, bytes from a cold disk, media a second over a slow line.

    make bench

That target runs ``python -m benchmarks.loading.loader [--rounds 3] [--folder FOLDER]`` in an environment with the
extras peers, mosaic and torchcodec.

The media are 24 loops of real footage, 512 frames of 224 pixels each (18.8 kB a frame, 231 MB). From each, 4, 8, 64
and 512 frames are sampled evenly. All readers return the same frames of the same media:

    libjpeg-turbo       JPEGs in memory decoded into one reused array: the upper limit
    frames alone        this project by byte offset, into reused arrays
    rows                this project's loader: tokens, labels and packed rows of 32,768 tokens, one decoding thread
    PEER                another loader with its own decoder; PyAV for Lance, and decord for others that have none
    PEER, lent          the same with the offsets from the MP4's own table, libjpeg-turbo, and reused arrays
    reference           the published method: decord on the 720p source, then its processor; one video, one round

The first table is for 4 frames of every medium from a cold disk, each reader in a new process. It comes first because
pages that a process has mapped stay in memory.

The second table is for a warm page cache on one core. Readers take turns, and a share is relative to the limit of the
same round. A round before them, which is not counted, opens every reader: this project's at every number of frames,
peers at the smallest.

The last table is for 4 frames over a slow line with 20 ms latency and 1 Gbit/s, with the offsets and libjpeg-turbo lent
to peers. webdataset and datasets read it by HTTP, the other peers as S3. This project, Lance and datasets, which open
single media, read 16 of them at once. The bytes of a medium are counted by the server, for the same passes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.building.build import loop
from benchmarks.loading.isolated import OURS, bytes_read, media_rate, quiet
from benchmarks.loading.media import EPOCH_FRAMES, BenchmarkMedia, write_media
from benchmarks.loading.readers import PEERS, Reader, by_offset, limit, peer, pixels, reference, rows
from benchmarks.loading.slow_server import SlowServer
from tests.helpers.media.footage import FOOTAGE

COUNTS = (4, 8, 64, 512)
SECONDS = 0.5  #: minimum time that a reader is timed for
DELAY, RATE = 0.020, 125e6  #: seconds, bytes a second
Rates = dict[str, dict[int, list[float]]]  #: reader -> number of frames -> frames a second of each round


def speeds(readers: dict[str, Reader], counts: Sequence[int], rounds: int, opened: Sequence[str] = ()) -> Rates:
    """Return frames a second of readers that take turns.

    The first of ``rounds + 1`` rounds is not counted. Readers in ``opened`` prepare nothing for a count, so they have
    only the smallest one there.
    """
    found: Rates = {name: {count: [] for count in counts} for name in readers}
    turns = [(number, count, name) for number in range(rounds + 1) for count in counts for name in readers]
    turns = [turn for turn in turns if turn[0] or turn[1] == min(counts) or turn[2] not in opened]
    for number, count, name in tqdm(turns, desc="readers", leave=False, disable=None):
        rate = frame_rate(readers[name], count)
        if number:
            found[name][count].append(rate)
    return found


def frame_rate(reader: Reader, count: int, seconds: float = SECONDS) -> float:
    """Return frames a second over complete passes that take at least ``seconds``."""
    frames, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds:
        frames += sum(len(array) for array in reader(count))
    return frames / passed


def shares(rates: Rates, base: str) -> Iterator[str]:
    """Yield the lines of a table, one for each reader: medians and ranges of its shares of ``base``."""
    counts = list(rates[base])
    yield "| of 512 frames | " + " | ".join(map(str, counts)) + " |"
    yield "| --- |" + " --- |" * len(counts)
    for name, found in rates.items():
        cells = []
        for count, values in found.items():
            if name == base:
                cells.append(f"{statistics.median(values):,.0f} frames/s")
                continue
            ratios = [value / limit_rate for value, limit_rate in zip(values, rates[base][count], strict=False)]
            spread = f" ({min(ratios):.3f} to {max(ratios):.3f})" if len(ratios) > 1 else ""
            cells.append(f"{statistics.median(ratios):.3f}{spread}" if max(ratios) < 0.1 else _short(ratios))
        yield f"| {name} | " + " | ".join(cells) + " |"


def _short(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def warm(media: BenchmarkMedia, source: Path, rounds: int) -> None:
    """Print the table of speeds on one core, and the speedup by a second thread on a second core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    readers = {"libjpeg-turbo": limit(media), "frames alone": pixels(media), "rows": rows(media)}
    peers = {f"{name}{lent}": peer(name, media, decoder) for name in PEERS
             for lent, decoder in (("", None), (", lent", by_offset))}  # fmt: skip
    rates = speeds(readers | peers, COUNTS, rounds, opened=list(peers))
    published = reference(source, media.size)
    rates["reference"] = {count: [frame_rate(published, count, 0.01)] for count in COUNTS}
    print("\n".join(shares(rates, "libjpeg-turbo")), end="\n\n")
    if len(cores) > 1:
        os.sched_setaffinity(0, set(sorted(cores)[:2]))
        print("\n".join(threads(media, rounds)), end="\n\n")
    os.sched_setaffinity(0, cores)


def threads(media: BenchmarkMedia, rounds: int) -> Iterator[str]:
    """Yield the lines of a table: speed of two decoding threads over that of one, on two cores."""
    pairs = {
        "frames alone": [pixels(media, n, least=EPOCH_FRAMES) for n in (1, 2)],
        "rows": [rows(media, n) for n in (1, 2)],
    }
    readers = {f"{name} {n}": reader for name, pair in pairs.items() for n, reader in enumerate(pair, 1)}
    rates = speeds(readers, COUNTS[2:], rounds)
    yield "| two threads / one | " + " | ".join(map(str, COUNTS[2:])) + " |"
    yield "| --- |" + " --- |" * len(COUNTS[2:])
    for name in pairs:
        one, two = rates[f"{name} 1"], rates[f"{name} 2"]
        yield (
            f"| {name} | "
            + " | ".join(_short([b / a for a, b in zip(one[count], two[count], strict=True)]) for count in one)
            + " |"
        )


def cold(media: BenchmarkMedia) -> None:
    """Print the table of bytes read from a cold disk."""
    print("| cold, 4 of 512 frames | kB a medium |\n| --- | --- |")
    for name in (OURS, *PEERS):
        print(f"| {name} | {bytes_read(name, media, 4) / media.count / 1e3:,.0f} |")
    print()


def slow(media: BenchmarkMedia, rounds: int) -> None:
    """Print the table of media a second over a slow line, with the first passes, which are not timed, in the bytes."""
    print("| 20 ms, 1 Gbit/s, 4 of 512 frames | media/s | kB a medium | requests a medium |\n| --- | --- | --- | --- |")
    with SlowServer(media.folder, DELAY, RATE) as server:
        for name in (OURS, *PEERS):
            server.sent()
            found = [media_rate(name, media, 4, server.address) for _ in range(rounds)]
            requests, sent = server.sent()
            read, rates = sum(count for _, count in found), [rate for rate, _ in found]
            speed = f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"
            print(f"| {name} | {speed} | {sent / read / 1e3:,.0f} | {requests / read:.1f} |", flush=True)


def main() -> None:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for the media, 2 GB on a disk; a temporary one")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="media-") as name:
        media = write_media(Path(name), 24, 512, 224)
        source = loop(FOOTAGE / "bigbuckbunny.mp4", Path(name) / "source.mp4", media.frames)
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        cold(media)
        warm(media, source, options.rounds)
        slow(media, options.rounds)


if __name__ == "__main__":
    main()
