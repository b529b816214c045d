"""Time to read every n-th frame of a video: by seeking, by decoding all frames, and as the build chooses.

    python -m benchmarks.building.seeks [--seconds 20]

The media are real 720p footage in a loop. Key frames are 1, 12, 50 and 250 frames apart, and one file is a transport
stream with open groups of pictures. ``chosen`` is what ``framestream.pipeline.media.video`` does. Times are processor
time of one process, the lower of two runs. Frames are decoded to RGB.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from framestream.pipeline.media import video
from tests.helpers.media.footage import FOOTAGE

ENCODINGS = {
    "intra.mp4": ("-g", "1"),
    "group12.mp4": ("-g", "12"),
    "group50.mp4": ("-g", "50"),
    "group250.mp4": ("-g", "250"),
    "open50.ts": ("-g", "50", "-x264-params", "open-gop=1"),
}
STEPS = (4, 15, 60, 240)  #: distance between requested frames
CHOSEN = video.SEEK_FRAMES, video.SEEK_FRAMES_IN_ORDER
METHODS = {"seek": (0, 0), "straight": (1 << 60, 1 << 60), "chosen": CHOSEN}  #: frames that a seek must skip


def encode(target: Path, seconds: int, options: tuple[str, ...]) -> None:
    """Encode a loop of the footage, ``seconds`` long."""
    source = ["-stream_loop", "-1", "-i", str(FOOTAGE / "bigbuckbunny.mp4"), "-t", str(seconds), "-an"]
    encoder = ["-c:v", "libx264", "-preset", "veryfast", *options]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *source, *encoder, str(target)], check=True)


def cost(path: Path, step: int, limits: tuple[int, int]) -> float:
    """Return the seconds of processor time for every ``step``-th frame."""
    video.SEEK_FRAMES, video.SEEK_FRAMES_IN_ORDER = limits
    started = time.process_time()
    source = video.open_video(path)
    for _ in source.decode_frames(np.arange(step // 2, len(source.seconds), step)):
        pass
    return time.process_time() - started


def main() -> None:
    """Print the milliseconds by step, a row for each encoding and method."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=int, default=20, help="length of the videos")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory() as folder:
        print(f"{'':<24}" + "".join(f"{f'every {step}':>12}" for step in STEPS) + "   ms")
        for name, options in ENCODINGS.items():
            path = Path(folder) / name
            encode(path, seconds, options)
            for method, limits in METHODS.items():
                costs = [min(cost(path, step, limits) for _ in range(2)) for step in STEPS]
                print(f"{name:<14}{method:<10}" + "".join(f"{1e3 * value:>12.0f}" for value in costs), flush=True)


if __name__ == "__main__":
    main()
