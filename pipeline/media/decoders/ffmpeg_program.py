"""The ffmpeg command: find it, build its arguments, and read the frames that it writes.

Frames come as uncompressed RGB in the NUT format through a pipe, with their presentation times. PyAV reads the pipe.
Arguments are built by ffmpeg-python, and no shell is involved.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from framestream.pipeline.media.errors import MAX_PIXELS, DecoderError, MediaError
from framestream.pipeline.media.video_stream import FORMATS, TAG_OPTIONS, device_error

OLDEST = (5, 1)  #: version of ffmpeg that has the options used here
CHECK_SECONDS = 60.0  #: time limit for asking ffmpeg for its version, or for a device
MAX_MESSAGE = 300  #: characters of ffmpeg's messages that are repeated
PIPE_BYTES = 1 << 20  #: bytes read from the pipe at a time


@dataclass(frozen=True, slots=True)
class FfmpegProgram:
    """An ffmpeg command."""

    path: str
    version: str  #: such as ``7.1.1`` or ``n9.0.2-17-g2a571b6068``


@dataclass(frozen=True, slots=True)
class FfmpegPass:
    """One run of ffmpeg over a file: what is decoded, and what is written of it."""

    path: Path
    stream: int  #: number of the video stream
    base: Fraction  #: seconds per tick of the times that are written
    filters: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  #: options of each filter by its name
    pixel_format: str = "rgb24"  #: of the frames that are written
    strict: bool = True  #: stop at the first error
    hwaccel: str = "none"
    start: float | None = None  #: second of the key frame at which reading begins; None for the first frame
    count: int = 0  #: frames after which ffmpeg stops; 0 for all


def find_ffmpeg(is_pinned: bool = False) -> FfmpegProgram:
    """Return ``ffmpeg`` on the path, or else that of imageio-ffmpeg.

    Args:
        is_pinned: take that of imageio-ffmpeg, so that what is on the path does not matter.

    Raises:
        DecoderError: it is not found, or too old.
    """
    path = None if is_pinned else shutil.which("ffmpeg")
    if path is None:
        try:
            import imageio_ffmpeg

            path = imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as error:
            text = " ".join(str(error).split())
            needs = "the package imageio-ffmpeg" if is_pinned else "ffmpeg on the path, or the package imageio-ffmpeg"
            raise DecoderError(f"data.decoder: needs {needs} ({text}); pip install imageio-ffmpeg") from None
    return FfmpegProgram(path, _read_version(path))


@functools.cache
def _read_version(path: str) -> str:
    try:
        done = subprocess.run(
            [path, "-version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_SECONDS, check=False
        )
        found = re.match(r"ffmpeg version (\S+)", done.stdout.decode("utf-8", "replace"))
    except (OSError, subprocess.TimeoutExpired):
        found = None
    if not found:
        raise DecoderError(f"data.decoder: {path} is not a working ffmpeg; remove it from the path")
    numbers = re.match(r"n?(\d+)\.(\d+)", found[1])  # builds of unreleased versions have none
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST:
        text = f"{path} is ffmpeg {found[1]}; version {'.'.join(map(str, OLDEST))} or newer is needed"
        raise DecoderError(f"data.decoder: {text}; install one, or remove it from the path")
    return found[1]


def load_ffmpeg_python() -> Any:
    """Import ffmpeg-python.

    Raises:
        DecoderError: it is not installed, or another package of that name is.
    """
    try:
        import ffmpeg
    except ImportError as error:
        text = f"needs the package ffmpeg-python ({error}); pip install ffmpeg-python"
        raise DecoderError(f"data.decoder: ffmpeg {text}") from None
    if not hasattr(ffmpeg, "input"):
        text = f"{ffmpeg.__file__} is another package"
        raise DecoderError(f"data.decoder: ffmpeg needs the package ffmpeg-python; {text}, remove it") from None
    return ffmpeg


def check_ffmpeg_device(hwaccel: str) -> None:
    """Check that ffmpeg can open a kind of device of this machine.

    Raises:
        DecoderError: it cannot.
    """
    options = ["-v", "error", "-nostdin", "-init_hw_device", hwaccel]
    nothing = ["-f", "lavfi", "-i", "nullsrc=s=16x16", "-frames:v", "1", "-f", "null", "-"]
    try:
        done = subprocess.run(
            [find_ffmpeg().path, *options, *nothing],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise device_error(hwaccel, f"ffmpeg does not answer within {CHECK_SECONDS:g} s") from None
    if done.returncode:
        raise device_error(hwaccel, _first_message(done.stderr) or "ffmpeg cannot open it")


def ffmpeg_arguments(program: FfmpegProgram, run: FfmpegPass, seconds: float) -> list[str]:
    """Return the command of a run, as a list of arguments."""
    ffmpeg = load_ffmpeg_python()
    inputs: dict[str, Any] = {
        "format_whitelist": f"{FORMATS},webp_anim",
        "protocol_whitelist": "file",
        "threads": 1,
        "max_pixels": MAX_PIXELS,
    }
    if run.strict:
        inputs["err_detect:v"] = "explode"
    if run.hwaccel != "none":
        inputs["hwaccel"] = run.hwaccel
    if run.start is not None:
        inputs |= {"seek_timestamp": 1, "noaccurate_seek": None, "ss": f"{run.start:.6f}"}
    video = ffmpeg.input(f"file:{run.path}", **inputs)[str(run.stream)]
    for name, options in run.filters.items():
        video = video.filter(name, **options)
    outputs: dict[str, Any] = {
        "format": "nut",
        "map_metadata": -1,
        "vcodec": "rawvideo",
        "pix_fmt": run.pixel_format,
        "fps_mode": "passthrough",
        "enc_time_base": f"{run.base.numerator}:{run.base.denominator}",
    }
    if run.count:
        outputs["frames:v"] = run.count
    command = [program.path, "-v", "error", "-nostdin", "-copyts", "-timelimit", str(int(seconds) + 1)]
    if run.strict:
        command.append("-xerror")
    return video.output("pipe:1", **outputs).compile(cmd=command)


def read_frames(
    program: FfmpegProgram, run: FfmpegPass, seconds: float, faults: list[str]
) -> Generator[tuple[int, av.VideoFrame], None, None]:
    """Run ffmpeg, and yield each frame that it writes with its time in ticks of ``run.base``.

    Args:
        program: the command.
        run: what it decodes.
        seconds: time limit.
        faults: receives a line if an error ended ffmpeg, or was reported in a run that is not strict. The frames before
            that are good.

    Raises:
        MediaError: timeout.
        DecoderError: ffmpeg cannot be started.
    """
    expired: list[bool] = []
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(
                ffmpeg_arguments(program, run, seconds), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors
            )
        except OSError as error:
            raise DecoderError(f"data.decoder: {program.path} cannot be started ({error.strerror})") from None

        pipe = process.stdout
        assert pipe is not None

        def stop() -> None:
            expired.append(True)
            process.kill()

        timer = threading.Timer(seconds, stop)
        timer.daemon = True
        timer.start()
        try:
            for frame in _read_nut(pipe):
                assert frame.pts is not None and frame.time_base is not None  # NUT has times for all frames
                yield round(frame.pts * frame.time_base / run.base), frame
            code = process.wait()
            if expired:
                text = f"ffmpeg needed more than {seconds:g} s; raise data.decode_timeout"
                raise MediaError("timeout", run.path, text)
            errors.seek(0)
            message = _first_message(errors.read(1 << 16)).replace(f"file:{run.path}", run.path.name)
            if code or (message and not run.strict):  # strict: what does not end ffmpeg is no error of the video
                faults.append(message or f"ffmpeg ended with exit code {code}")
        finally:
            timer.cancel()
            process.kill()
            pipe.close()
            process.wait()


def _read_nut(pipe: Any) -> Iterator[av.VideoFrame]:
    """Yield the frames of a NUT stream up to its end, or to where it is cut off."""
    with (
        contextlib.suppress(av.FFmpegError, EOFError),
        av.open(pipe, format="nut", buffer_size=PIPE_BYTES, **TAG_OPTIONS) as container,
    ):
        yield from container.decode(video=0)


def _first_message(output: bytes) -> str:
    """Return the first line of ffmpeg's messages, without the part of ffmpeg that it comes from."""
    lines = [line.strip() for line in output.decode("utf-8", "replace").splitlines()]
    return re.sub(r"^(\[[^\]]*\]\s*)+", "", next(filter(None, lines), ""))[:MAX_MESSAGE]
