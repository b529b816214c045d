"""Read images safely, and encode them for storage in shards."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from framestream.pipeline.config.preprocessing import ImagesConfig
from framestream.pipeline.media.errors import MAX_PIXELS, MediaError, check_file
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg

Image.init()  # registers every plugin; Image.OPEN has only the registered formats
#: Formats that are opened; not EPS, PSD and the like, which run programs or embed other data.
_ACCEPTED: tuple[str, ...] = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FORMATS = [name for name in _ACCEPTED if name in Image.OPEN]
MAX_BYTES = 1 << 29  #: of an image file; a larger one is not read into memory
_ORIENTATION = 0x0112  # EXIF tag


def read_image(path: str | Path) -> Image.Image:
    """Read an image as RGB, turned upright by its EXIF orientation; of an animation, the first frame.

    Raises:
        MediaError: missing_file, empty_file, not_media, unsupported (too many pixels), truncated or corrupt.
    """
    path = check_file(path)
    return _load(path, _read(path))[0]


def encode_image(path: str | Path, images: ImagesConfig) -> tuple[bytes, int, int, int, int]:
    """Encode an image for storage: (JPEG, width, height, source width, source height), sizes in pixels, upright.

    The bytes of a JPEG stay unchanged if it is RGB or gray and upright, its longer side is at most ``images.max_side``,
    and libjpeg-turbo reads it. Any other image is reduced to ``max_side`` if larger (bicubic), and encoded at
    ``images.quality`` with full chroma.

    Raises:
        MediaError: as for :func:`read_image`.
    """
    path = check_file(path)
    data = _read(path)
    image, is_plain = _load(path, data)
    width, height = image.size
    if is_plain and max(width, height) <= images.max_side and _is_turbo_readable(data):
        return data, width, height, width, height
    scale = images.max_side / max(width, height)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    return encode_jpeg(np.asarray(image), images.quality, "444"), *image.size, width, height


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaError("unsupported", path, f"has more than {MAX_BYTES >> 20} MB, too many for an image")
    return data


def _load(path: Path, data: bytes) -> tuple[Image.Image, bool]:
    """Decode to RGB; the flag says whether the bytes are an upright RGB or gray JPEG."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd EXIF data and sizes; sizes are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise MediaError("unsupported", path, f"{image.width} x {image.height} pixels are too many")
                image.load()
                is_upright = image.getexif().get(_ORIENTATION, 1) in (0, 1)
                is_plain = image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright
                return _to_rgb(image if is_upright else ImageOps.exif_transpose(image)), is_plain
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError("not_media", path, "is not an image in a known format, whatever its name says") from None
    except Image.DecompressionBombError as error:
        raise MediaError("unsupported", path, str(error)) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise MediaError(reason, path, f"cannot be decoded ({error}); fetch the file again") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # 16-bit gray, which Pillow would clip instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _is_turbo_readable(data: bytes) -> bool:
    try:
        decode_jpeg(data)
    except ValueError:
        return False
    return True
