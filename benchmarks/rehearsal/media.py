"""Small media of every kind that the published entries name, as bytes."""

from __future__ import annotations

import io
from functools import cache

import av
import numpy as np
from PIL import Image

from tests.helpers.corpora.media_corpus import picture

WIDTH, HEIGHT = 64, 48  #: of a video frame
FPS = 8  #: of a video whose length is given in seconds
CODECS = {"mp4": "libx264", "mkv": "libx264", "mov": "libx264", "webm": "libvpx", "avi": "mpeg4"}  #: by extension
IMAGE_FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG"}  #: by extension


@cache
def draw_image(extension: str, seed: int, size: tuple[int, int]) -> bytes:
    """Draw a smooth random image of ``size`` (width, height)."""
    stream = io.BytesIO()
    Image.fromarray(picture(seed, *size)).save(stream, IMAGE_FORMATS[extension])
    return stream.getvalue()


@cache
def draw_video(extension: str, seed: int, frames: int, fps: int = FPS) -> bytes:
    """Draw a video of an image that moves to the right."""
    stream, base = io.BytesIO(), picture(seed, WIDTH, HEIGHT)
    form = {"mkv": "matroska"}.get(extension, extension)
    with av.open(stream, "w", format=form) as container:
        video = container.add_stream(CODECS[extension], rate=fps, options={"threads": "1"})
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(frames):
            shifted = np.ascontiguousarray(np.roll(base, number, axis=1))
            container.mux(video.encode(av.VideoFrame.from_ndarray(shifted, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


@cache
def draw_gif(seed: int, frames: int) -> bytes:
    """Draw an animated GIF of 10 frames a second."""
    stream = io.BytesIO()
    images = [Image.fromarray(np.roll(picture(seed, WIDTH, HEIGHT), 3 * n, axis=1)) for n in range(frames)]
    images[0].save(stream, "GIF", save_all=True, append_images=images[1:], duration=100)
    return stream.getvalue()


def draw_frames(pattern: str, seed: int, frames: int) -> dict[str, bytes]:
    """Draw the frames of a folder: ``pattern.format(number)`` from 1 on, and their bytes."""
    return {pattern.format(n + 1): draw_image("jpg", seed + n % 8, (WIDTH, HEIGHT)) for n in range(frames)}
