"""Broken and unusual files, as found in real collections. Every function writes one file (or folder) at a path.

Videos show their frame numbers (:mod:`tests.helpers.media.footage`), so that a test can tell which frames it was given.
"""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
from PIL import Image

from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.media.footage import numbered, write_video

Maker = Callable[[Path], object]
SHORT_GROUPS = {"g": "12", "bf": "2"}


def numbered_video(
    count: int = 100,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    seconds: Sequence[float] | None = None,
    size: tuple[int, int] = (64, 32),
    matrix: tuple[int, int, int, int] | None = None,
    container: str | None = None,
    tags: dict[str, int] | None = None,
) -> Maker:
    """Return a maker of a numbered video at 25 frames a second, or with frames at ``seconds``.

    Args:
        size: width, height.
        matrix: display matrix (a, b, c, d); the frames are stored so that it turns them upright.
        container: as ffmpeg calls it; else what the name says.
        tags: attributes of the encoder, such as ``color_trc``.
    """

    def make(path: Path) -> None:
        base = Fraction(1, 25) if seconds is None else Fraction(1, 12_800)
        with av.open(str(path), "w", format=container) as file:
            stream = file.add_stream(codec, rate=25, options=SHORT_GROUPS if options is None else options)
            first = stored(numbered(0), size, matrix)
            stream.width, stream.height, stream.pix_fmt = first.shape[1], first.shape[0], pix_fmt
            stream.codec_context.time_base = base
            stream.codec_context.thread_count = 1
            for name, value in (tags or {}).items():
                setattr(stream.codec_context, name, value)
            if matrix is not None:
                a, b, c, d = (65536 * value for value in matrix)
                stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30))
            for number in range(count):
                frame = av.VideoFrame.from_ndarray(stored(numbered(number), size, matrix), format="rgb24")
                frame.time_base = base
                frame.pts = number if seconds is None else round(seconds[number] / base)
                file.mux(stream.encode(frame))
            file.mux(stream.encode(None))

    return make


def stored(upright: np.ndarray, size: tuple[int, int], matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Return the pixels that a display matrix shows as ``upright``: (x, y) is shown at (a x + c y, b x + d y)."""
    picture = np.asarray(Image.fromarray(upright).resize(size, Image.Resampling.NEAREST))
    if matrix is None:
        return picture
    a, b, c, d = matrix
    height, width = picture.shape[:2]
    shape = (height, width) if a else (width, height)
    y, x = np.mgrid[: shape[0], : shape[1]]
    across, down = a * x + c * y, b * x + d * y
    return picture[down - down.min(), across - across.min()]


def ffmpeg(*arguments: str) -> None:
    """Run ffmpeg's command line."""
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments], check=True)


def remuxed(make: Maker, *arguments: str, before: Sequence[str] = (), suffix: str = ".mp4", to: str = "mp4") -> Maker:
    """Return a maker that writes ffmpeg's remux of the file of ``make``, without decoding."""

    def write(path: Path) -> None:
        source = path.parent / f"source-of-{path.stem}{suffix}"
        make(source)
        ffmpeg(*before, "-i", str(source), "-c", "copy", *arguments, "-f", to, str(path))
        source.unlink()

    return write


def faststart(make: Maker) -> Maker:
    """Return a maker that writes an MP4 with its index at the front."""
    return remuxed(make, "-movflags", "+faststart")


def cut(make: Maker, share: float, after: bytes = b"") -> Maker:
    """Return a maker that writes the first ``share`` of a file's bytes, or of those after a marker."""

    def write(path: Path) -> None:
        make(path)
        data = path.read_bytes()
        begin = data.index(after) if after else 0
        path.write_bytes(data[: begin + int((len(data) - begin) * share)])

    return write


def damaged(make: Maker, share: float, count: int = 40, after: bytes = b"") -> Maker:
    """Return a maker that puts ``count`` random bytes at ``share`` of a file, or of the part after a marker."""

    def write(path: Path) -> None:
        make(path)
        data = bytearray(path.read_bytes())
        begin = data.index(after) + len(after) if after else 0
        place = begin + int((len(data) - begin) * share)
        data[place : place + count] = random.Random(1).randbytes(count)
        path.write_bytes(data)

    return write


def damaged_packet(make: Maker, number: int) -> Maker:
    """Return a maker that writes a file with random bytes in the second half of packet ``number``."""

    def write(path: Path) -> None:
        make(path)
        with av.open(str(path)) as file:
            packet = [packet for packet in file.demux(video=0) if packet.size][number]
        data, half = bytearray(path.read_bytes()), packet.size // 2
        data[packet.pos + packet.size - half : packet.pos + packet.size] = random.Random(1).randbytes(half)
        path.write_bytes(data)

    return write


def patched(make: Maker, mark: bytes, offset: int, value: bytes) -> Maker:
    """Return a maker that writes a file with ``value`` at ``offset`` bytes after the end of a marker."""

    def write(path: Path) -> None:
        make(path)
        data = bytearray(path.read_bytes())
        place = data.index(mark) + len(mark) + offset
        data[place : place + len(value)] = value
        path.write_bytes(data)

    return write


def holding(data: bytes | str) -> Maker:
    """Return a maker that writes a file with these bytes."""
    return lambda path: path.write_bytes(data.encode() if isinstance(data, str) else data)


def in_format(kind: str, mode: str = "RGB", size: tuple[int, int] = (40, 30), **options: object) -> Maker:
    """Return a maker that writes an image in one of Pillow's formats, independent of its extension."""

    def make(path: Path) -> None:
        Image.fromarray(corpus.picture(1, *size)).convert(mode).save(path, kind, **options)

    return make


def picture_bytes(kind: str, **options: object) -> bytes:
    """Return an encoded image."""
    buffer = io.BytesIO()
    Image.fromarray(corpus.picture(1, 40, 30)).save(buffer, kind, **options)
    return buffer.getvalue()


def turned_jpeg(path: Path) -> None:
    """Write a JPEG that its EXIF data rotate by a quarter turn."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path.write_bytes(picture_bytes("JPEG", exif=exif))


def deep_png(path: Path) -> None:
    """Write a gray PNG with 16 bits."""
    grey = np.asarray(Image.fromarray(corpus.picture(1, 40, 30)).convert("L")).astype(np.uint16) * 257
    Image.fromarray(grey).save(path, "PNG")


def animated_webp(path: Path) -> None:
    """Write a WebP of three images."""
    pictures = [Image.fromarray(corpus.picture(seed, 40, 30)) for seed in (1, 2, 3)]
    pictures[0].save(path, "WEBP", save_all=True, append_images=pictures[1:], lossless=True)


def png_bomb(path: Path) -> None:
    """Write a PNG whose header declares 3.6 billion pixels."""
    import zlib

    data = bytearray(picture_bytes("PNG"))
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    path.write_bytes(data)


def gif(path: Path, colours: Sequence[str] = ("red", "lime", "blue", "white")) -> None:
    """Write a GIF of flat frames."""
    frames = [Image.new("RGB", (40, 20), colour) for colour in colours]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=40)


def odd_gif(path: Path) -> None:
    """Write a GIF of a red canvas and three smaller frames: a blue square at (10, 5), and two transparent ones.

    It is written byte by byte, because no library writes frames of different sizes.
    """
    palette = bytes((255, 0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0))  # red, blue, and twice black
    out = b"GIF89a" + struct.pack("<HHBBB", 40, 20, 0x81, 0, 0) + palette
    for place, size, index in (((0, 0), (40, 20), 0), ((10, 5), (8, 8), 1), ((0, 0), (2, 2), 3), ((30, 0), (4, 20), 3)):
        out += b"\x21\xf9\x04" + struct.pack("<BHBB", 1 << 2 | (index == 3), 4, 3, 0)  # keep it; 3 is transparent
        out += b"\x2c" + struct.pack("<HHHHB", *place, *size, 0) + b"\x02"
        out += _gif_codes([index] * (size[0] * size[1]))
    path.write_bytes(out + b"\x3b")


def _gif_codes(indices: list[int]) -> bytes:
    """Encode 2-bit indices as LZW without compression: the table is cleared before codes get longer."""
    bits, count = 0, 0
    for place, index in enumerate(indices):
        for code in [4, index] if place % 2 == 0 else [index]:
            bits |= code << count
            count += 3
    bits |= 5 << count
    data = bits.to_bytes((count + 3 + 7) // 8, "little")
    blocks = [data[place : place + 255] for place in range(0, len(data), 255)]
    return b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"


def sound_with_cover(path: Path) -> None:
    """Write a sound file with a cover image, which is not a video."""
    sound, cover = path.with_suffix(".part.m4a"), path.with_suffix(".part.jpg")
    corpus.sound(sound)
    cover.write_bytes(picture_bytes("JPEG"))
    streams = ["-i", str(sound), "-i", str(cover), "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*streams, "-disposition:v:0", "attached_pic", "-f", "mp4", str(path))
    sound.unlink()
    cover.unlink()


def cover_before_video(path: Path) -> None:
    """Write a numbered video after a cover image with many more pixels."""
    video, cover = path.with_suffix(".part.mp4"), path.with_suffix(".part.jpg")
    write_video(video, 50)
    Image.fromarray(corpus.picture(1, 1600, 1200)).save(cover)
    streams = ["-i", str(cover), "-i", str(video), "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*streams, "-disposition:v:0", "attached_pic", "-f", "mp4", str(path))
    video.unlink()
    cover.unlink()


def two_videos(path: Path) -> None:
    """Write a numbered video and a gray one that is not the default stream."""
    video, grey = path.with_suffix(".part.mp4"), path.with_suffix(".part2.mp4")
    write_video(video, 100)
    ffmpeg("-f", "lavfi", "-i", "color=gray:s=64x32:r=25:d=4", str(grey))
    streams = ["-i", str(grey), "-i", str(video), "-map", "0", "-map", "1", "-c", "copy"]
    ffmpeg(*streams, "-disposition:v:0", "0", "-disposition:v:1", "default", "-f", "matroska", str(path))
    video.unlink()
    grey.unlink()


def wave(path: Path) -> None:
    """Write a WAV file."""
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", "-f", "wav", str(path))


def grows(path: Path) -> None:
    """Write a raw H.264 stream, without timestamps, whose frames double in size after 50 frames."""
    data = b""
    for half in (0, 1):
        encoder = av.CodecContext.create("libx264", "w")
        encoder.width, encoder.height, encoder.pix_fmt = 64 << half, 32 << half, "yuv420p"
        encoder.framerate, encoder.time_base, encoder.options = Fraction(25), Fraction(1, 25), SHORT_GROUPS
        for number in range(50 * half, 50 * half + 50):
            big = numbered(number).repeat(1 << half, 0).repeat(1 << half, 1)
            frame = av.VideoFrame.from_ndarray(big, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            data += b"".join(map(bytes, encoder.encode(frame)))
        data += b"".join(map(bytes, encoder.encode(None)))
    path.write_bytes(data)


def frame_folder(names: Sequence[str], sizes: Sequence[tuple[int, int]] = ((64, 32),)) -> Maker:
    """Return a maker that writes a folder whose k-th file shows the number k, with ``sizes`` in rotation."""

    def make(path: Path) -> None:
        path.mkdir()
        for number, name in enumerate(names):
            picture = Image.fromarray(numbered(number)).resize(sizes[number % len(sizes)], Image.Resampling.NEAREST)
            picture.save(path / name)

    return make


def folder(path: Path) -> None:
    """Create an empty folder."""
    path.mkdir()


def folder_with(name: str, make: Maker) -> Maker:
    """Return a maker that writes a folder of four numbered images, with another file added or replacing one of them."""

    def write(path: Path) -> None:
        frame_folder(["1.jpg", "2.jpg", "3.jpg", "4.jpg"])(path)
        (path / name).unlink(missing_ok=True)
        make(path / name)

    return write


def copy_of(path: Path) -> Maker:
    """Return a maker that copies a file."""
    return lambda target: target.write_bytes(path.read_bytes())


def same_as(other: str) -> Maker:
    """Return a maker that creates a link."""
    return lambda path: path.symlink_to(other)


def pipe(path: Path) -> None:
    """Create a named pipe without a writer: opening it blocks forever."""
    os.mkfifo(path)
