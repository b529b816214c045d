"""Compare the speed of a build with that of its decoder, in one run.

    python -m benchmarks.building.build [--minutes 10] [--repeats 3]

The media are real 720p footage looped at 30 frames a second and sampled at 1 frame a second, and the 5-second clip
itself at 64 frames. Both are stored at 224 pixels. All decoders have one thread. Everything runs on one processor, but
the build with two workers has two. ffmpeg's command line decodes, filters and encodes in its own threads, so on more
processors its rate would be that of more than one worker. A build is timed from the submission of a task to the
finished shard on disk. Its workers are running and have each finished one task before. The others, each on the same
video:

    decode      the build's own reader, which decodes the same frames to RGB
    bare        the same frames decoded, resized by Pillow and encoded, nothing written
    ffmpeg      ffmpeg's command line, which writes as many frames of the same size to JPEG files
    re-encode   ffmpeg, which writes an MP4 of the same size from all frames, as video2dataset does

Rounds of all of these are interleaved. The table has medians, and shares of the rate of `build`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from PIL import Image

from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.sampling import pad_to_clips, sample_indices
from framestream.pipeline.media.video import open_video
from framestream.tools.builder.build import make_job
from framestream.tools.builder.planner import make_plan
from framestream.tools.builder.task import make_worker
from framestream.tools.builder.worker_pool import WorkerPool
from framestream.tools.fetch.root_map import resolve_entries
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.media.footage import FOOTAGE

SIZE, RATE = 224, 30
SAMPLERS = {  #: kind of media -> sampler, smallest and largest number of frames
    "long": ("fps1", 4, 4096),
    "short": ("dynamic_fps1", 64, 512),
}


def loop(source: Path, target: Path, seconds: float) -> Path:
    """Write a loop of ``source`` at ``RATE`` frames a second: encode it once and repeat its packets."""
    once = target.with_suffix(".once.mp4")
    with av.open(str(source)) as reader, av.open(str(once), "w") as writer:
        stream = writer.add_stream("libx264", rate=RATE, options={"crf": "23", "preset": "medium"})
        stream.width, stream.height = reader.streams.video[0].width, reader.streams.video[0].height
        for number, frame in enumerate(reader.decode(video=0)):
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
        length = number + 1
    with av.open(str(target), "w") as writer:
        stream = None
        for turn in range(round(seconds * RATE / length)):
            with av.open(str(once)) as reader:
                stream = stream or writer.add_stream_from_template(reader.streams.video[0])
                shift = round(turn * length / RATE / reader.streams.video[0].time_base)
                for packet in reader.demux(video=0):
                    if packet.dts is not None:
                        packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, stream
                        writer.mux(packet)
    once.unlink()
    return target


class Builds:
    """Builds of copies of one video, by worker pools of one and of two processes that keep running."""

    def __init__(self, folder: Path, kind: str, path: Path, copies: int, repeats: int) -> None:
        (folder / "media").mkdir(parents=True)
        self._copies, samples = copies, []
        for number in range(2 + 2 * copies * repeats):
            os.link(path, folder / "media" / f"{number}{path.suffix}")
            samples.append({"id": number, "video": f"{number}{path.suffix}", "conversations": corpus.TURNS})
        corpus.annotations(folder / "all.json", samples)
        entry = {"annotation": str(folder / "all.json"), "root": str(folder / "media")}
        sampler, low, high = SAMPLERS[kind]
        frames = {"sampler": sampler, "min": low, "max": high, "size": SIZE}
        file = corpus.manifest(folder / "stage2.yaml", [entry], frames=frames)
        self.manifest = load_manifest(file, ("data.shard_mb=1",))
        self._pools = {}
        for workers in (1, 2):
            found, work = resolve_entries(self.manifest), folder / f"work{workers}"
            (work / "plan").mkdir(parents=True)
            (work / "tasks").mkdir()
            make_plan(self.manifest, found, work / "plan")
            job = make_job(self.manifest, found, work)
            tasks = [task for task, name in enumerate(job.tasks) if name.startswith("video")]
            with processors(workers):
                pool = WorkerPool(make_worker, (job,), workers)
                list(pool.run(tasks[:workers]))
            self._pools[workers] = pool, iter(tasks[workers:])

    def run(self, workers: int) -> Callable[[], None]:
        """Return a function that builds ``copies`` videos for each worker."""
        pool, tasks = self._pools[workers]

        def build() -> None:
            list(pool.run([next(tasks) for _ in range(workers * self._copies)]))

        return build

    def frames(self, path: Path) -> np.ndarray:
        """Return the distinct source frames that a build stores of the video."""
        source, frames = open_video(path), self.manifest.frames
        indices = sample_indices(frames, len(source.seconds), source.fps, len(source.seconds) / source.fps)
        return np.unique(pad_to_clips(indices, len(source.seconds), frames.clip_frames))


@contextlib.contextmanager
def processors(count: int) -> Iterator[None]:
    """Restrict this process, and those that it starts, to ``count`` processors."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def decode_all(path: Path, numbers: np.ndarray) -> None:
    """Decode the frames to RGB."""
    for _ in open_video(path).decode_frames(numbers):
        pass


def bare(path: Path, numbers: np.ndarray) -> None:
    """Decode, resize and encode the frames."""
    for frame in open_video(path).decode_frames(numbers):
        encode_jpeg(np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), Image.Resampling.BICUBIC)), 90, "420")


def ffmpeg(path: Path, numbers: np.ndarray) -> None:
    """Write as many frames to JPEG files with ffmpeg."""
    with av.open(str(path)) as container:
        seconds = container.duration / av.time_base
    _run_ffmpeg(path, f"fps={len(numbers) / seconds:.4f},scale={SIZE}:{SIZE}:flags=bicubic", ["-q:v", "3"], "%06d.jpg")


def re_encode(path: Path, numbers: np.ndarray) -> None:
    """All frames to a smaller MP4 by ffmpeg."""
    _run_ffmpeg(path, f"scale={SIZE}:{SIZE}", ["-an", "-c:v", "libx264"], "video.mp4")


def _run_ffmpeg(path: Path, filters: str, settings: list[str], name: str) -> None:
    threads = ["-threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        program = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *threads, "-i", str(path), "-filter_threads", "1"]
        subprocess.run([*program, "-vf", filters, *settings, *threads, f"{folder}/{name}"], check=True)


def measure_build(folder: Path, kind: str, path: Path, copies: int, repeats: int) -> None:
    """Print the table of one kind of media."""
    builds = Builds(folder, kind, path, copies, repeats)
    numbers = builds.frames(path)

    def each(work: Callable[[Path, np.ndarray], None]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(copies):
                work(path, numbers)

        return run

    ways = {
        "build, one worker": builds.run(1),
        "build, two workers": builds.run(2),
        **{name: each(work) for name, work in (("decode", decode_all), ("bare", bare), ("ffmpeg", ffmpeg))},
        "re-encode": each(re_encode),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, work in ways.items():
            with processors(2 if "two" in name else 1):
                start = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - start)
    frames = {name: len(numbers) * copies * (2 if "two" in name else 1) for name in ways}
    rates = {name: [frames[name] / s for s in found] for name, found in seconds.items()}
    one = rates["build, one worker"]
    print(f"{kind}: {len(numbers)} frames of {path.stat().st_size / 1e6:.1f} MB, {copies} copies, {repeats} rounds")
    print(f"  {'':<20}{'frames/s':>10}{'build / it':>12}   lowest to highest of the rounds")
    for name, found in rates.items():
        shares = [a / b for a, b in zip(one, found, strict=True)]
        if "two" in name:
            shares = [1 / share for share in shares]
        label = "two / one" if "two" in name else ""
        spread = f"{min(shares):.2f} to {max(shares):.2f} {label}"
        print(f"  {name:<20}{statistics.median(found):>10.1f}{statistics.median(shares):>12.2f}   {spread}")


def main() -> None:
    """Measure both kinds of media."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="length of the long video")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = folder / "short.mp4"
        short.write_bytes((FOOTAGE / "bigbuckbunny.mp4").read_bytes())
        long = loop(short, folder / "long.mp4", options.minutes * 60)
        measure_build(folder / "s", "short", short, 8, options.repeats)
        measure_build(folder / "l", "long", long, 1, options.repeats)


if __name__ == "__main__":
    main()
