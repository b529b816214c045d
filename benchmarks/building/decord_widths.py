"""List the widths of the MJPEG in shards that decord cannot read on this processor.

    python -m benchmarks.building.decord_widths [--up-to 518]

Every even width is encoded as two JPEG frames of 16 lines in an MP4, as in a shard. decord and this project read it. A
width that decord rejects is printed with the row length from decord's error.
"""

from __future__ import annotations

import argparse
import io
import re

import decord
import numpy as np

from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg

HEIGHT = 16
SIZES = re.compile(r"\((\d+) vs\. \d+\)")  #: the bytes that decord has; it expects the other number


def refused_widths(up_to: int) -> dict[int, int]:
    """Return the even widths from 4 to ``up_to`` that decord cannot read, each with decord's bytes of a row."""
    refused = {}
    for width in range(4, up_to + 1, 2):
        pixels = np.random.default_rng(width).integers(0, 255, (2, HEIGHT, width, 3), dtype=np.uint8)
        mp4 = mux_mjpeg([encode_jpeg(frame, 90, "420") for frame in pixels], np.arange(2.0), 2.0, width, HEIGHT)
        offsets, sizes, _ = mjpeg_frames(mp4)
        assert decode_jpeg(mp4[offsets[0] : offsets[0] + sizes[0]]).shape == (HEIGHT, width, 3)
        try:
            decord.VideoReader(io.BytesIO(mp4), num_threads=1).get_batch([0])
        except decord.DECORDError as error:
            found = SIZES.search(str(error))
            refused[width] = int(found[1]) // HEIGHT if found else 0
    return refused


def main() -> None:
    """Print the widths that decord rejects."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.building.decord_widths", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--up-to", type=int, default=518, metavar="WIDTH")
    options = parser.parse_args()
    refused = refused_widths(options.up_to)
    print(f"decord {decord.__version__} refuses {len(refused)} of {options.up_to // 2 - 1} even widths")
    for width, row in refused.items():
        print(f"{width} pixels: rows of {row} bytes, {row // 3} pixels")


if __name__ == "__main__":
    main()
