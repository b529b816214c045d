"""Videos and images as the model sees them: frames selected and resized as in training, tiles, and time messages.

a video file, a GIF or frames -> sampler -> resize -> JPEG and back, as frames are stored in shards -> clips
an image -> JPEG and back -> grid of tiles with an overview -> tiles
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig
from framestream.pipeline.media.errors import MediaError, check_file
from framestream.pipeline.media.pixels import image_to_rgb
from framestream.pipeline.media.resize import resize, stored_size
from framestream.pipeline.media.sampling import pad_to_clips, sample_indices, time_message
from framestream.pipeline.media.tiling import raster_order, split_into_tiles

CHROMA = {"444": 0, "422": 1, "420": 2}  #: Pillow's numbers of chroma subsampling
IMAGE_SUBSAMPLING = "444"  #: of images that are encoded again
ORIENTATION = 0x0112  #: EXIF tag
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]{0,30}://|data:", re.ASCII | re.IGNORECASE)  #: how a text begins that is no path

ReadFn = Callable[[np.ndarray], Iterable[np.ndarray]]  #: yields frames, uint8 (H, W, 3), by ascending numbers


@dataclass(frozen=True)
class ModelMedia:
    """A video or an image as inputs of the model."""

    clips: np.ndarray  #: uint8 (N, T, S, S, 3), of a video
    tiles: np.ndarray  #: uint8 (M, S, S, 3), of an image
    order: np.ndarray  #: int64 (V,), its visual tokens in the order of the text, as rows of its clips' or tiles' tokens
    message: str  #: time message of a video


def load_video(
    video: Any, frames: FramesConfig, fps: float = 1.0, start: float | None = None, end: float | None = None
) -> ModelMedia:
    """Select and resize the frames of a video.

    Args:
        video: a path, or a sequence of frames: images, arrays uint8 (H, W, 3), or paths of image files.
        frames: the sampler and sizes of training. Without ``quality``, frames are not compressed.
        fps: frames per second of a sequence of frames; a GIF has one.
        start, end: seconds between which a video file is shown; None for its beginning and its end.

    Raises:
        MediaError: a file cannot be used; one line that names it.
        ValueError: an argument is of another kind, there are no frames, or the sampler does not fit.
    """
    for name, seconds in (("start", start), ("end", end)):
        if seconds is not None and not _is_number(seconds):
            raise ValueError(f"{name} is {seconds!r:.40}; it must be a number of seconds, such as 2.5")
    if isinstance(video, (str, Path)):
        path = _check_path(video, "a video", "pass a list of the images in it, in their order")
        sequence = _gif_frames(path)
        if sequence is None:
            return _read_file(path, frames, start, end)
        video, fps = sequence, 1.0
    if start is not None or end is not None:
        raise ValueError("start and end need a video file; pass the frames between them")
    is_sequence = hasattr(video, "__len__") and hasattr(video, "__getitem__")
    if not is_sequence or isinstance(video, (bytes, bytearray, Mapping)):
        raise ValueError(f"a video is a {type(video).__name__}; pass a path, or a list of frames")
    if not len(video):
        raise ValueError("a video has no frames; pass a path, or at least one frame")
    if not _is_number(fps) or not fps > 0:
        raise ValueError(f"fps is {fps!r:.40}; it must be a number above 0")

    def read(numbers: np.ndarray) -> Iterable[np.ndarray]:
        shrink = _shrinker(frames)
        return (shrink(_to_rgb(video[number])) for number in numbers.tolist())

    return _show(read, len(video), fps, len(video) / fps, frames)


def load_image(image: Any, images: ImagesConfig, size: int, several: bool) -> ModelMedia:
    """Divide an image into tiles.

    Args:
        image: a path, an image, or an array, uint8 (H, W, 3).
        images: the grid of training. Without ``quality``, images are not compressed.
        size: S, pixels along a side of a tile.
        several: its dialogue has several images, so that each is one tile.

    Raises:
        MediaError: the file cannot be used; one line that names it.
    """
    opened = _open_image(image) if isinstance(image, (str, Path)) else image
    is_stored = _is_stored_unchanged(opened)
    pixels = _to_rgb(opened)
    scale = images.max_side / max(pixels.shape[:2])
    if scale < 1:
        height, width = (max(1, round(side * scale)) for side in pixels.shape[:2])
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    if images.quality and (scale < 1 or not is_stored):
        pixels = _compress(pixels, images.quality, IMAGE_SUBSAMPLING)
    tiles, grid = split_into_tiles(Image.fromarray(pixels), images.mode, size, images.max_grid, several)
    order = np.arange(TOKENS_PER_TILE * len(tiles)) if grid is None else raster_order(grid)
    return ModelMedia(np.empty((0, 0, size, size, 3), dtype=np.uint8), tiles, order, "")


def _read_file(path: Path, frames: FramesConfig, start: float | None, end: float | None) -> ModelMedia:
    """Read a video file; one in which seeking is not exact is decoded from its beginning."""
    # here, because PyAV is needed for files alone
    from framestream.pipeline.media.video import (
        InexactSeekError,
        VideoSource,
        clip_bounds,
        open_sequential,
        open_video,
    )

    minimum = max(frames.min, frames.clip_frames)

    def predict(source: VideoSource) -> list[int]:
        try:
            first, stop, duration = clip_bounds(path, source, start, end)
        except MediaError:
            return []
        return (first + _select(stop - first, source.fps, duration, frames)).tolist()

    def show(source: VideoSource) -> ModelMedia:
        first, stop, duration = clip_bounds(path, source, start, end)
        is_cut = source.damaged and (end is None or end > source.end)
        if is_cut and stop - first < minimum:
            text = f"is damaged, and has only {stop - first} frames before that; {minimum} are needed"
            raise MediaError("too_few_frames", path, f"{text}; fetch the file again")
        return _show(lambda numbers: source.decode_frames(numbers + first), stop - first, source.fps, duration, frames)

    try:
        return show(open_video(path, _shrinker(frames)))
    except InexactSeekError:
        return show(open_sequential(path, _shrinker(frames), predict, minimum))


def _select(count: int, fps: float, duration: float, frames: FramesConfig) -> np.ndarray:
    """Return the numbers of the frames that are shown, int64 (n,), with repeats."""
    rng = np.random.default_rng(0)  # of the sampler `rand`
    return pad_to_clips(sample_indices(frames, count, fps, duration, rng), count, frames.clip_frames)


def _show(read: ReadFn, count: int, fps: float, duration: float, frames: FramesConfig) -> ModelMedia:
    """Select frames of a video, or a clip of it, of ``count`` frames, and lay them out as clips of the model."""
    indices = _select(count, fps, duration, frames)
    distinct, inverse = np.unique(indices, return_inverse=True)
    side = frames.size
    shown = np.empty((len(distinct), side, side, 3), dtype=np.uint8)
    found = 0
    for frame in read(distinct):
        if frames.quality:
            frame = _compress(frame, frames.quality, frames.subsampling)
        shown[found] = resize(frame, side, side)
        found += 1
    if found < len(distinct):
        raise ValueError(f"only {found} of {len(distinct)} frames of the video decode the second time")
    clips = shown[inverse].reshape(-1, frames.clip_frames, side, side, 3)
    message = time_message(frames.time_message, duration, indices, fps)
    tokens = np.arange(TOKENS_PER_CLIP * len(clips))
    return ModelMedia(clips, np.empty((0, side, side, 3), dtype=np.uint8), tokens, message)


def _shrinker(frames: FramesConfig) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that resizes frames to the size that shards store, which follows from the first frame."""
    stored: list[tuple[int, int]] = []

    def shrink(frame: np.ndarray) -> np.ndarray:
        if not stored:
            stored.append(stored_size(frames.resize, frames.size, frame.shape[1], frame.shape[0]))
        return resize(frame, *stored[0])

    return shrink


def _compress(pixels: np.ndarray, quality: int, subsampling: str) -> np.ndarray:
    """Return pixels as a JPEG holds them: the model has seen such frames."""
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=CHROMA[subsampling])
        file.seek(0)
        with Image.open(file) as image:
            return np.asarray(image.convert("RGB"))


def _gif_frames(path: Path) -> Sequence[Image.Image] | None:
    """Return the frames of a GIF on black; None for other files."""
    with open(path, "rb") as file:
        if file.read(4) != b"GIF8":
            return None
    try:
        with Image.open(path, formats=("GIF",)) as gif:
            frames = [frame.convert("RGBA") for frame in ImageSequence.Iterator(gif)]
    except (OSError, EOFError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError("corrupt", path, f"the GIF cannot be read ({error})") from None
    return [Image.alpha_composite(Image.new("RGBA", frame.size, "black"), frame).convert("RGB") for frame in frames]


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_path(path: str | Path, kind: str, instead: str) -> Path:
    """Return the path of a file on this machine.

    Args:
        kind: what is expected there, for messages.
        instead: what to do with a folder.

    Raises:
        ValueError: it is an address, whose rest may be a key and is not shown.
        MediaError: it is a folder, or a file that cannot be used.
    """
    if address := ADDRESS.match(str(path)):
        fix = "fetch the file first, and pass its path"
        raise ValueError(f"{kind} is an address ({address[0]}...), and addresses are refused; {fix}")
    if Path(path).is_dir():
        raise MediaError("not_media", path, f"is a folder; {instead}")
    return check_file(path)


def _open_image(path: str | Path) -> Image.Image:
    path = _check_path(path, "an image", "pass the path of an image in it")
    try:
        with Image.open(path) as image:
            image.load()
            image.getexif()  # read while the file is open
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError("not_media", path, f"cannot be read as an image ({error})") from None


def _is_stored_unchanged(image: Any) -> bool:
    """Return whether shards store the file of an image as it is: an upright JPEG."""
    is_plain = isinstance(image, Image.Image) and image.format == "JPEG" and image.mode in ("RGB", "L")
    return is_plain and _orientation(image) in (0, 1)


def _orientation(image: Image.Image) -> int:
    value = image.getexif().get(ORIENTATION, 1)
    return value if isinstance(value, int) and 0 <= value <= 8 else 1


def _to_rgb(frame: Any) -> np.ndarray:
    """Return the pixels of a path, an image or an array: uint8 (H, W, 3), upright."""
    if isinstance(frame, (str, Path)):
        frame = _open_image(frame)
    if isinstance(frame, Image.Image):
        rgb = image_to_rgb(frame)
        rgb.getexif()[ORIENTATION] = _orientation(frame)
        return np.asarray(ImageOps.exif_transpose(rgb))
    pixels = np.asarray(frame)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"a frame is {pixels.dtype} {pixels.shape}; pass uint8 pixels (height, width, 3)")
    return pixels
