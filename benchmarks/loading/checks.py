"""Compare reading with the digest of every frame checked to reading without, in one process.

    python -m benchmarks.loading.checks [--videos 12] [--size 224] [--rounds 9]

Videos of 512 stored frames are read by one thread, 4, 64 or 512 frames of each. The two ways take turns, in both
orders. The table has the median frames/s of each and the median of the rounds' ratios, with the smallest and largest.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.loading.media import BenchmarkMedia, write_media
from framestream.pipeline.shards.frame_reader import FrameReader
from framestream.pipeline.shards.index import FRAME_DIGEST, Index

STORED = 512
COUNTS = (4, 64, 512)
MIN_FRAMES = 3000  #: frames that one measurement reads at least


def readers(media: BenchmarkMedia) -> dict[str, FrameReader]:
    """Return readers of one root that check frames, and that do not."""
    index = Index.open(media.root)
    unchecked = dataclasses.replace(index, media=index.media.drop_columns(FRAME_DIGEST))
    return {"checked": FrameReader(index), "unchecked": FrameReader(unchecked)}


def frames_per_second(reader: FrameReader, media: BenchmarkMedia, count: int) -> float:
    """Read ``count`` frames of every video until there are ``MIN_FRAMES``; return frames per second."""
    out = np.empty((count, media.size, media.size, 3), dtype=np.uint8)
    numbers = media.frame_numbers(count)
    rounds = -(-MIN_FRAMES // (count * media.count))
    start = time.perf_counter()
    for _ in range(rounds):
        for row in range(media.count):
            reader.read_frames(row, numbers, out)
    return rounds * media.count * count / (time.perf_counter() - start)


def compare_ways(media: BenchmarkMedia, count: int, rounds: int) -> tuple[dict[str, list[float]], list[float]]:
    """Return frames/s of every round for each way, and checked / unchecked of every round."""
    ways = readers(media)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for reader in ways.values():  # fill the page cache
        frames_per_second(reader, media, count)
    for number in range(rounds):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            rates[name].append(frames_per_second(ways[name], media, count))
    return rates, [a / b for a, b in zip(rates["checked"], rates["unchecked"], strict=True)]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=12)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        media = write_media(Path(folder), options.videos, STORED, options.size)
        print("| frames of a video | checked, frames/s | unchecked, frames/s | ratio |\n| --- | --- | --- | --- |")
        for count in COUNTS:
            rates, ratios = compare_ways(media, count, options.rounds)
            checked, unchecked = (statistics.median(rates[name]) for name in ("checked", "unchecked"))
            ratio = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
            print(f"| {count} | {checked:.0f} | {unchecked:.0f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
