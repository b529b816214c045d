"""Read images safely, and encode them for storage in shards."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from framestream.pipeline.config.preprocessing import ImagesConfig
from framestream.pipeline.media.errors import MAX_PIXELS, MediaError, check_file
from framestream.pipeline.media.file_kinds import name_of_other_file
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg
from framestream.pipeline.media.pixels import image_to_rgb

Image.init()  # registers every plugin; Image.OPEN has only the registered formats
#: Formats that are opened; not EPS, PSD and the like, which run programs or embed other data.
_ACCEPTED: tuple[str, ...] = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
FORMATS = [name for name in _ACCEPTED if name in Image.OPEN]
MAX_BYTES = 1 << 29  #: of an image file; a larger one is not read into memory
#: Pixels of a JPEG, which is reduced while it is decoded, and of any other image.
MAX_JPEG_PIXELS, MAX_IMAGE_PIXELS = 210_000_000, 1 << 27
MAX_SCANS = 1 << 32  #: pixels times scans of a JPEG: a progressive one may have thousands
Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS // 2  # Pillow refuses twice as many
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
    image, is_plain, (width, height) = _load(path, data)
    if is_plain and max(width, height) <= images.max_side and _is_turbo_readable(data):
        return data, width, height, width, height
    scale = images.max_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale))) if scale < 1 else (width, height)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return encode_jpeg(np.asarray(image), images.quality, "444"), *image.size, width, height


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise MediaError("unsupported", path, f"has more than {MAX_BYTES >> 20} MB, too many for an image")
    return data


def _load(path: Path, data: bytes) -> tuple[Image.Image, bool, tuple[int, int]]:
    """Decode to RGB; return the image, whether the bytes are an upright RGB or gray JPEG, and the size of the source.

    An image of over ``MAX_PIXELS`` pixels is returned with half or fewer of them on each side.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings about odd EXIF data and sizes; sizes are checked here
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                size = image.size
                _check_size(path, data, image)
                is_large = size[0] * size[1] > MAX_PIXELS
                if is_large:
                    image.draft(image.mode, (size[0] // 2, size[1] // 2))  # has an effect on JPEGs
                image.load()
                is_upright = _orientation(image) in (0, 1)
                is_plain = image.format == "JPEG" and image.mode in ("RGB", "L") and is_upright and image.size == size
                rgb = image_to_rgb(_halved(image) if is_large and image.size == size else image)
                if not is_upright:
                    rgb.getexif()[_ORIENTATION] = _orientation(image)
                    rgb = ImageOps.exif_transpose(rgb)
                    size = size[::-1] if _orientation(image) >= 5 else size
                return rgb, is_plain, size
    except MediaError:
        raise
    except UnidentifiedImageError:
        raise MediaError("not_media", path, name_of_other_file(data)) from None
    except Image.DecompressionBombError as error:
        raise MediaError("unsupported", path, str(error)) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error ...
        if "truncated" in str(error).lower():
            raise MediaError("truncated", path, f"cannot be decoded ({error}); fetch the file again") from None
        raise MediaError("corrupt", path, f"cannot be decoded ({error})") from None


def _halved(image: Image.Image) -> Image.Image:
    """Return an image with half the pixels on each side, before conversions need several times its memory."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.ascontiguousarray(np.asarray(image)[::2, ::2]))
    if image.info.get("transparency") is not None:
        image = image.convert("RGBA")
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image.reduce(2)


def _check_size(path: Path, data: bytes, image: Image.Image) -> None:
    """Raise MediaError if an image has too many pixels, or too many scans for its pixels."""
    pixels = image.width * image.height
    limit = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_IMAGE_PIXELS
    if pixels > limit:
        text = f"{image.width} x {image.height} pixels are too many; an image of this kind may have {limit:,}"
        raise MediaError("unsupported", path, text)
    if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") * pixels > MAX_SCANS:
        raise MediaError("unsupported", path, "is a progressive JPEG with too many scans; save it as a baseline JPEG")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1 if its EXIF data cannot be read."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # Pillow raises OSError, SyntaxError, ValueError, struct.error ...
        return 1
    return value if isinstance(value, int) and 0 <= value <= 8 else 1


def _is_turbo_readable(data: bytes) -> bool:
    try:
        decode_jpeg(data)
    except ValueError:
        return False
    return True
