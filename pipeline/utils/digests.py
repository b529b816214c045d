"""Digests that tell damaged bytes from those that were written.

They are XXH3 sums (https://xxhash.com): much faster than decoding, and made to find damage. They do not protect against
somebody who changes a file and its digest on purpose.
"""

from __future__ import annotations

from pathlib import Path

import xxhash

BLOCK = 1 << 18  #: bytes that are read at a time


def bytes_digest(data: bytes | memoryview) -> str:
    """Return the XXH3 sum of ``data``, 64 bits as 16 hex digits."""
    return xxhash.xxh3_64_hexdigest(data)


def file_digest(path: str | Path) -> str:
    """Return the XXH3 sum of a file, 64 bits as 16 hex digits.

    Raises:
        OSError: the file cannot be read.
    """
    digest, block = xxhash.xxh3_64(), memoryview(bytearray(BLOCK))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def frame_digest(data: bytes | memoryview) -> int:
    """Return the lower 32 bits of the XXH3 sum of a stored frame, as the index keeps it."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF
