"""Small files that promise, or unpack to, very much: each is made by hand and of one kind of file.

A mutant is one of them in 20, because random damage does not find them.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

LARGE = 1 << 30  #: bytes that a bomb unpacks to
SIDES = (65_500, 30_000, 2**31 - 1)  #: declared pixels of an image's side


def forge(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    """Replace a file by a forgery of its kind; return the forgery's name, or empty text if the kind has no forgery."""
    choices = [make for suffixes, make in FORGERIES if path.suffix in suffixes]
    if not choices:
        return ""
    make = rng.choice(choices)
    made = make(data, rng)
    path.write_bytes(made or b"")
    return make.__name__ if made else ""


@functools.lru_cache(maxsize=4)
def _packed(text: bytes, size: int) -> bytes:
    packer, block = zlib.compressobj(1, wbits=31), text * 1024
    return b"".join([packer.compress(block) for _ in range(size // len(block))]) + packer.flush()


def gzip_of_one_string(data: bytes, rng: random.Random) -> bytes:
    return gzip.compress(b'[{"id": "', mtime=0) + _packed(b"a" * 1024, LARGE)


def gzip_of_spaces(data: bytes, rng: random.Random) -> bytes:
    return _packed(b" " * 1024, LARGE)


def gzip_of_small_samples(data: bytes, rng: random.Random) -> bytes:
    return _packed(b"{}\n" * 256, LARGE >> 9)


def sample_of_many_images(data: bytes, rng: random.Random) -> bytes:
    sample = {"id": "many", "image": ["0.jpg"] * 300_000, "conversations": []}
    sample["conversations"] = [{"from": "human", "value": "<image>" * 300_000}, {"from": "gpt", "value": "yes"}]
    return json.dumps([sample]).encode()


def long_string(data: bytes, rng: random.Random) -> bytes:
    text = json.dumps([{"id": "a" * 50_000_000, "conversations": []}])
    return text.encode()


def many_keys(data: bytes, rng: random.Random) -> bytes:
    return _many_keys()


@functools.cache
def _many_keys() -> bytes:
    return json.dumps({f"key {number}": number for number in range(1_000_000)}).encode()


def yaml_aliases(data: bytes, rng: random.Random) -> bytes:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return "\n".join([*lines, data.decode(errors="replace")]).encode()


def yaml_depth(data: bytes, rng: random.Random) -> bytes:
    return data + b"\nx: " + b"[" * 50_000


def yaml_number(data: bytes, rng: random.Random) -> bytes:
    return data.replace(b"stage: 2", b"stage: 2:" + b"59:" * 40_000 + b"1", 1) + b"\nnumber: " + b"9" * 200_000


def png_sides(data: bytes, rng: random.Random) -> bytes:
    side = rng.choice(SIDES)
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b""))
    made = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + made


def png_text(data: bytes, rng: random.Random) -> bytes:
    body = b"Comment\0\0" + _packed(bytes(1024), 1 << 28)[10:]
    chunk = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    return data[:33] + chunk + data[33:]


def jpeg_sides(data: bytes, rng: random.Random) -> bytes:
    place = next((data.find(mark) for mark in (b"\xff\xc0", b"\xff\xc2") if mark in data), -1)
    side = struct.pack(">HH", 65_500, 65_500)
    return data[: place + 5] + side + data[place + 9 :] if place >= 0 else b""


def gif_sides(data: bytes, rng: random.Random) -> bytes:
    return data[:6] + struct.pack("<HH", 65_535, 65_535) + data[10:]


def bmp_sides(data: bytes, rng: random.Random) -> bytes:
    return data[:18] + struct.pack("<ii", 200_000, 200_000) + data[26:]


def ppm_sides(data: bytes, rng: random.Random) -> bytes:
    return b"P6\n200000 200000\n255\n" + data


def tensors_without_end(data: bytes, rng: random.Random) -> bytes:
    header = b", ".join(b'"t%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' % n for n in range(300_000))
    return (len(header) + 2).to_bytes(8, "little") + b"{" + header + b"}"


def tensor_of_great_shape(data: bytes, rng: random.Random) -> bytes:
    shape = [0, *rng.choice(((2**40,), (2**62, 2**62), (1,) * 5000))]
    header = json.dumps({"model.embed_tokens.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}})
    return len(header).to_bytes(8, "little") + header.encode()


@functools.cache
def _dictionary() -> bytes:
    out, rows = io.BytesIO(), 3000
    turns = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "yes"}]
    image = {"bytes": b"no image", "path": "0.jpg"}
    name = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * (1 << 20)]))
    table = pa.table({"id": name, "image": [image] * rows, "conversations": [turns] * rows})
    pq.write_table(table, out, compression="zstd", row_group_size=rows)
    return out.getvalue()


def parquet_dictionary(data: bytes, rng: random.Random) -> bytes:
    return _dictionary()


def zip_of_zeros(data: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    names = [member.filename for member in zipfile.ZipFile(io.BytesIO(data)).infolist()]
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))) as archive:
        for name in names[:2]:
            archive.writestr(name, bytes(LARGE >> 2))
    return out.getvalue()


def zip_of_many(data: bytes, rng: random.Random) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for number in range(20_000):
            archive.writestr(f"media/{number}", b"")
    return out.getvalue()


def bzip2_instead(data: bytes, rng: random.Random) -> bytes:
    return bz2.compress(bytes(1 << 24))


Forgery = Callable[[bytes, random.Random], bytes]
_JSON = (".json", ".jsonl")
FORGERIES: tuple[tuple[tuple[str, ...], Forgery], ...] = (
    ((".gz",), gzip_of_one_string),
    ((".gz",), gzip_of_spaces),
    ((".gz",), gzip_of_small_samples),
    ((".gz",), bzip2_instead),
    (_JSON, sample_of_many_images),
    (_JSON, long_string),
    (_JSON, many_keys),
    ((".yaml",), yaml_aliases),
    ((".yaml",), yaml_depth),
    ((".yaml",), yaml_number),
    ((".png",), png_sides),
    ((".png",), png_text),
    ((".jpg",), jpeg_sides),
    ((".gif",), gif_sides),
    ((".bmp",), bmp_sides),
    ((".ppm",), ppm_sides),
    ((".safetensors",), tensors_without_end),
    ((".safetensors",), tensor_of_great_shape),
    ((".parquet",), parquet_dictionary),
    ((".zip",), zip_of_zeros),
    ((".zip",), zip_of_many),
)
