"""A synthetic stage-3 epoch: lengths and costs of dialogues, for measuring rows where there is no index.

The shares follow the published list of stage 3: short and long videos, images and text. Text lengths are log-normal, as
token counts of instruction data are. ``docs/streaming.md`` has the table that this command prints:

    python -m benchmarks.loading.lengths [--batches 400]

It packs global batches of 256 such dialogues into rows of 32,768 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np

from framestream.pipeline.config.loading import CostModel
from framestream.pipeline.config.model import TOKENS_PER_TILE
from framestream.pipeline.planning.packing import costs, load_balance, pack

BATCH, ROW = 256, 32_768  #: dialogues of a global batch, tokens of a row
TOKENS_PER_FRAME = 16
PATCHES = 196  #: of a frame of 224 pixels
#: UMT-L on 224 pixels with the connector, and Qwen2-7B: ``python -m trainer --dry-run`` prints these for stage 3.
COST = CostModel(patch=1.9725e9, token=4.2424e10, pair=6.02112e5)


class Kind(NamedTuple):
    """One kind of dialogue: its share, and its numbers of frames or tiles and of text tokens."""

    share: float
    low: int  #: frames of a video or tiles of an image, log-uniform from low to high
    high: int
    text: int  #: median tokens of text
    spread: float  #: standard deviation of the logarithm of the tokens of text


KINDS = {
    "long video": Kind(0.20, 128, 512, 250, 0.8),
    "video": Kind(0.50, 64, 128, 200, 0.9),
    "image": Kind(0.20, 2, 37, 250, 0.9),
    "text": Kind(0.10, 0, 0, 500, 0.9),
}


class Lengths(NamedTuple):
    """Dialogues of a synthetic epoch."""

    tokens: np.ndarray  #: int64 (n,), visual tokens included
    patches: np.ndarray  #: int64 (n,), patches of the vision tower


def stage3(count: int, seed: int = 0) -> Lengths:
    """Return ``count`` random dialogues of complete clips of 4 frames, each at most 32,768 tokens."""
    rng = np.random.default_rng(seed)
    kinds = rng.choice(len(KINDS), size=count, p=[kind.share for kind in KINDS.values()])
    tokens, patches = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for number, (name, kind) in enumerate(KINDS.items()):
        members = np.flatnonzero(kinds == number)
        text = np.exp(rng.normal(np.log(kind.text), kind.spread, len(members))).astype(np.int64) + 30
        frames = np.zeros(len(members), dtype=np.int64)  # tiles where the kind is an image
        if kind.high:
            frames = np.exp(rng.uniform(np.log(kind.low), np.log(kind.high + 1), len(members))).astype(np.int64)
        if name == "image":
            visual = frames * TOKENS_PER_TILE
        else:
            frames = frames // 4 * 4
            visual = frames * TOKENS_PER_FRAME
        tokens[members] = np.minimum(text + visual, ROW)
        patches[members] = frames * PATCHES
    return Lengths(tokens, patches)


def lengths_table(batches: int) -> None:
    """Print rows, fill and balance of ``batches`` global batches, by ``row_multiple`` and number of ranks."""
    lengths = stage3(BATCH * batches)
    cost, tokens = costs(COST, lengths.patches, lengths.tokens), lengths.tokens
    median = int(np.median(tokens))
    print(f"{BATCH} dialogues a batch: {tokens.mean():.0f} tokens in the mean, {median} median, at most {tokens.max()}")
    print(f"{'multiple':>9}{'ranks':>7}{'rows':>7}{'fill':>8}{'balance':>9}{'worst':>8}{'ms':>7}")
    for multiple, worlds in ((8, (8,)), (32, (8, 32)), (64, (8, 32, 64))):
        packed, seconds = [], []
        for part in (slice(BATCH * batch, BATCH * (batch + 1)) for batch in range(batches)):
            start = time.perf_counter()
            rows = pack(tokens[part], cost[part], ROW, multiple)
            seconds.append(time.perf_counter() - start)
            packed.append([cost[part][row] for row in rows])
        count = sum(len(rows) for rows in packed)
        fill, spent = tokens.sum() / (count * ROW), 1000 * statistics.median(seconds)
        for ranks in worlds:
            every = load_balance([row for rows in packed for row in rows], ranks)
            worst = min(load_balance(rows, ranks) for rows in packed)
            rows = f"{count / batches:>7.1f}{fill:>8.3f}"
            print(f"{multiple:>9}{ranks:>7}{rows}{every:>9.3f}{worst:>8.3f}{spent:>7.1f}")


def main() -> None:
    """Print the table of rows, fill and balance."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--batches", type=int, default=400)
    lengths_table(parser.parse_args().batches)


if __name__ == "__main__":
    main()
