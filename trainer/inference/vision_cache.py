"""Encode each clip and each image tile once, however many questions show it."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Iterable, Iterator

import torch

from framestream.pipeline.evaluation.pixel_stream import Pixels
from framestream.trainer.inference.byte_cache import ByteCache
from framestream.trainer.inference.vision_stream import Tower, encode_groups, units_of

MAX_BYTES = 1 << 30  #: bytes of cached tokens


class VisionFeatureCache:
    """Least recently used tokens of clips and tiles, by a digest of their pixels. For models that are not trained.

        cache = VisionFeatureCache(model.vision_tower, device)
        questions.prompt(i, encode=cache)

    Pixels are in the host's memory. They are compared there, and only those of new clips and tiles are copied.

    Args:
        tower: computes the tokens of clips and tiles that are not in the cache.
        device: of ``tower`` and of the tokens.
        max_bytes: the oldest tokens are dropped above this size.
    """

    def __init__(self, tower: Tower, device: torch.device, max_bytes: int = MAX_BYTES) -> None:
        self._tower, self._device = tower, device
        self._tokens: ByteCache[torch.Tensor] = ByteCache(max_bytes)

    @torch.no_grad()
    def __call__(self, pixels: Iterable[Pixels]) -> torch.Tensor:
        """Return the tokens of all clips, then of all tiles: (units, 64, C).

        Args:
            pixels: at least one clip or tile; clips before tiles.
        """
        digests: list[bytes] = []
        found: dict[bytes, torch.Tensor] = {}
        missing: collections.deque[bytes] = collections.deque()

        def new_units() -> Iterator[Pixels]:
            waiting = set()  # a unit that is shown twice is encoded once
            for unit in units_of(pixels):
                digest = _digest(unit)
                digests.append(digest)
                if digest in found or digest in waiting:
                    continue
                if (known := self._tokens.get(digest)) is not None:
                    found[digest] = known
                else:
                    waiting.add(digest)
                    missing.append(digest)
                    yield unit

        for tokens in encode_groups(self._tower, new_units(), self._device):
            found |= {missing.popleft(): row.clone() for row in tokens}
        for digest in digests:
            self._tokens.put(digest, found[digest], found[digest].nbytes)
        return torch.stack([found[digest] for digest in digests])


def _digest(unit: Pixels) -> bytes:
    """Digest the pixels of a clip or a tile; their numbers of bytes differ, so a clip is never taken for a tile."""
    clip, tile = unit
    pixels = clip if len(clip) else tile
    return hashlib.blake2b(pixels.cpu().contiguous().numpy().reshape(-1).data, digest_size=16).digest()
