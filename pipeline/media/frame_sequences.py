"""Read frames by number from GIFs, at 1 frame per second, and from folders of images, at 1 or, for TVQA, 3."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from decimal import Decimal
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageSequence

from framestream.pipeline.media.errors import MAX_PIXELS, MediaError, check_file
from framestream.pipeline.media.image import read_image
from framestream.pipeline.media.video import ResizeFn, VideoSource, identity

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png")  #: of the files of a folder that are frames
_INTEGER = re.compile(r"[0-9]+")
_DECIMAL = re.compile(r"(?<![0-9.])[0-9]+\.([0-9]+)(?!\.?[0-9])")  #: not of dates and versions: 2024.01.05
_NUMBER = re.compile(rf"{_DECIMAL.pattern.replace('([0-9]+)', '[0-9]+')}|{_INTEGER.pattern}")


def open_gif(path: str | Path, resize: ResizeFn = identity) -> VideoSource:
    """Open a GIF at 1 frame per second, whatever its own delays; transparent pixels become black.

    A frame that covers a part of the image is drawn over the frames before it, as the file states.

    Raises:
        MediaError: the file is not a GIF, or no frame of it decodes.
    """
    path = check_file(path)
    count, broken = 0, False
    try:
        with Image.open(path, formats=("GIF",)) as gif:
            if gif.width * gif.height > MAX_PIXELS:
                raise MediaError("unsupported", path, f"{gif.width} x {gif.height} pixels are too many")
            for frame in ImageSequence.Iterator(gif):
                frame.load()
                count += 1
    except MediaError:
        raise
    except Image.DecompressionBombError as error:
        raise MediaError("unsupported", path, str(error)) from None
    except Exception as error:  # Pillow's decoders raise OSError, EOFError, ValueError, struct.error ...
        if not count:
            raise _gif_error(path, error) from None
        broken = True

    def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
        wanted = set(numbers.tolist())
        with Image.open(path, formats=("GIF",)) as gif:
            for number, frame in zip(range(int(numbers[-1]) + 1), ImageSequence.Iterator(gif), strict=False):
                if number in wanted:
                    rgba = frame.convert("RGBA")
                    on_black = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
                    yield resize(np.asarray(on_black.convert("RGB")))

    return VideoSource(np.arange(count, dtype=np.float64), 1.0, float(count), broken, decode_frames)


def _gif_error(path: Path, error: Exception) -> MediaError:
    with open(path, "rb") as file:
        if file.read(4) != b"GIF8":
            return MediaError("not_media", path, f"cannot be read as a GIF ({error})")
    reason = "truncated" if isinstance(error, EOFError) or "truncated" in str(error).lower() else "corrupt"
    return MediaError(reason, path, f"no frame of the GIF can be read ({error}); fetch the file again")


def sort_frames(names: Collection[str]) -> list[str]:
    """Return the names that are frames, in their order, of the names of a folder's images.

    Names that differ only in their numbers are ordered by these, the first number first. Other names are ordered by
    their last number. ``0.5`` is one number, unless the part after the point counts: 1.9, 1.10. If any name has a
    number, those without one, such as ``cover.jpg``, are no frames.
    """
    stems = {name: PurePath(name).stem for name in sorted(names)}
    fractions = [match[1] for stem in stems.values() for match in _DECIMAL.finditer(stem)]
    counted = len(set(map(len, fractions))) > 1 and any(len(text) > 1 and text.endswith("0") for text in fractions)
    pattern = _INTEGER if counted else _NUMBER
    numbers = {name: tuple(map(Decimal, pattern.findall(stem))) for name, stem in stems.items()}
    frames = [name for name in stems if numbers[name]] or list(stems)
    is_uniform = len({pattern.sub("0", stems[name]) for name in frames}) == 1
    return sorted(frames, key=lambda name: numbers[name] if is_uniform else numbers[name][-1:])


def open_folder(
    path: str | Path, resize: ResizeFn = identity, order: Callable[[str], int] | None = None, name: str = ""
) -> VideoSource:
    """Open a folder of jpg, jpeg and png frames. Hidden files, other files and folders in it are no frames.

    Numbers give the order of the frames, not their times: a gap in the numbers is not a gap in time. There are 3 frames
    per second if ``name`` (or ``path``, if it is empty) contains tvqa.

    Args:
        order: sorts all images by this number of their names, then by name; None for :func:`sort_frames`.

    Raises:
        MediaError: the folder does not exist or has no images. ``decode_frames`` raises it for a broken image.
    """
    path = Path(path)
    try:
        with os.scandir(path) as items:
            images = [item.name for item in items if _is_image(item.name) and not item.is_dir()]
    except NotADirectoryError:
        raise MediaError("not_media", path, "is not a folder of frames; use the reader decord for videos") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise MediaError("missing_file", path, f"the folder of frames cannot be read ({text})") from None
    if not images:
        raise MediaError("empty_file", path, "the folder has no jpg, jpeg or png files")
    names = sorted(sorted(images), key=order) if order else sort_frames(images)
    fps = 3.0 if "tvqa" in (name or str(path)) else 1.0

    def decode_frames(numbers: np.ndarray) -> Iterator[np.ndarray]:
        return (resize(np.asarray(read_image(path / names[number]))) for number in numbers.tolist())

    return VideoSource(np.arange(len(names)) / fps, fps, len(names) / fps, False, decode_frames)


def _is_image(name: str) -> bool:
    """Return whether a file of this name is a frame; hidden files such as ``._0001.jpg`` of macOS are not."""
    return not name.startswith(".") and PurePath(name).suffix.lower() in IMAGE_EXTENSIONS
