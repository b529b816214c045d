"""Still pictures: reading them safely, and their form in shards."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from framestream.pipeline.config.preprocessing import ImagesConfig
from framestream.pipeline.media.errors import MAX_PIXELS, MediaError, check_file
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg

Image.init()  # registers every plugin; Pillow would else look up formats that are not there yet
#: Formats that are opened; not EPS, PSD and the like, which run or embed other programs' data.
FORMATS = [f for f in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if f in Image.OPEN]
MAX_BYTES = 1 << 29  #: of a picture's file; a larger one is not read into memory
_ORIENTATION = 0x0112  # EXIF tag


def read_image(path: str | Path) -> Image.Image:
    """The picture as RGB, turned upright as its EXIF data say; of an animation the first frame.

    Raises:
        MediaError: missing_file, empty_file, not_media, unsupported (too many pixels), truncated or corrupt.
    """
    path = check_file(path)
    return _load(path, _read(path))[0]


def encode_image(path: str | Path, images: ImagesConfig) -> tuple[bytes, int, int, int, int]:
    """A still as it is stored: (JPEG, width, height, source width, source height), sizes in pixels, upright.

    A JPEG in RGB or grey that libjpeg-turbo reads, lies upright and is at most ``images.max_side`` on its longer side
    is kept byte for byte. Anything else is reduced to ``max_side`` where larger (bicubic) and encoded at
    ``images.quality`` with full chroma.

    Raises:
        MediaError: as :func:`read_image`.
    """
    path = check_file(path)
    data = _read(path)
    picture, plain = _load(path, data)
    width, height = picture.size
    if plain and max(width, height) <= images.max_side and _turbo_reads(data):
        return data, width, height, width, height
    scale = images.max_side / max(width, height)
    if scale < 1:
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return encode_jpeg(np.asarray(picture), images.quality, "444"), *picture.size, width, height


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaError("unsupported", path, f"has more than {MAX_BYTES >> 20} MB, too many for a picture")
    return data


def _load(path: Path, data: bytes) -> tuple[Image.Image, bool]:
    """The RGB picture and whether its bytes are an upright RGB or grey JPEG."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd EXIF data and sizes; sizes are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    raise MediaError("unsupported", path, f"{picture.width} x {picture.height} pixels are too many")
                picture.load()
                upright = picture.getexif().get(_ORIENTATION, 1) in (0, 1)
                plain = picture.format == "JPEG" and picture.mode in ("RGB", "L") and upright
                return _rgb(picture if upright else ImageOps.exif_transpose(picture)), plain
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError("not_media", path, "is no picture in a known format, whatever its name says") from None
    except Image.DecompressionBombError as error:
        raise MediaError("unsupported", path, str(error)) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        reason = "truncated" if "truncated" in str(error).lower() else "corrupt"
        raise MediaError(reason, path, f"cannot be decoded ({error}); fetch the file again") from None


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip instead of scaling
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    return picture.convert("RGB")


def _turbo_reads(data: bytes) -> bool:
    try:
        decode_jpeg(data)
    except ValueError:
        return False
    return True
