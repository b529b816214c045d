"""Compare the frames that decord's random access and this project's return, on frames that carry a number.

    python -m benchmarks.building.decoders [--requests 60] [--seed 0]

Every file has 250 frames whose pixels show their own number. A request is for 8 random frames in order, as a sampler
sends it. `wrong` counts frames that show another number than the requested one. No decoder raised an error for them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np

from framestream.pipeline.media.video import InexactSeekError, open_sequential, open_video
from tests.helpers.media.footage import number_of, write_video

FRAMES, SAMPLE = 250, 8
FILES = {
    "H.264, 250-frame groups": ("h264.mp4", "libx264", {"g": "250", "x264-params": "keyint=250:bframes=3"}),
    "H.264, open groups, TS": ("open.ts", "libx264", {"x264-params": "keyint=25:open-gop=1:bframes=3"}),
    "MPEG-4 part 2, B-frames": ("mpeg4.mp4", "mpeg4", {"g": "12", "bf": "2", "q:v": "2"}),
    "VP9": ("vp9.webm", "libvpx-vp9", {"g": "60", "deadline": "realtime", "cpu-used": "8"}),
}


def with_decord(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function that reads frames by ``VideoReader.get_batch`` with one thread."""
    decord.logging.set_level(decord.logging.QUIET)
    reader = decord.VideoReader(str(path), num_threads=1)
    return lambda numbers: list(reader.get_batch(numbers.tolist()).asnumpy())


def with_framestream(path: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    """Return a function that reads frames by ``framestream.pipeline.media.video``.

    It seeks, or decodes from the beginning where seeking is not exact.
    """
    try:
        source = open_video(path)
        list(source.decode_frames(np.arange(0, FRAMES, 7)))
    except InexactSeekError:
        source = open_sequential(path)
    return lambda numbers: list(source.decode_frames(numbers))


def main() -> None:
    """Print one row for each file and decoder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    requests = [np.sort(rng.choice(FRAMES, SAMPLE, replace=False)) for _ in range(options.requests)]
    print(f"{'file':<26}{'decoder':<13}{'wrong frames':>14}{'frames/s':>10}")
    with tempfile.TemporaryDirectory() as folder:
        for title, (name, codec, settings) in FILES.items():
            path = write_video(Path(folder) / name, FRAMES, codec, settings)
            for decoder, opener in (("decord", with_decord), ("framestream", with_framestream)):
                read = opener(path)
                start = time.perf_counter()
                shown = [number_of(frame) for numbers in requests for frame in read(numbers)]
                seconds = time.perf_counter() - start
                wrong = sum(a != b for a, b in zip(shown, np.concatenate(requests).tolist(), strict=True))
                print(f"{title:<26}{decoder:<13}{f'{wrong} of {len(shown)}':>14}{len(shown) / seconds:>10.0f}")


if __name__ == "__main__":
    main()
