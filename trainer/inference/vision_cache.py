"""Encode each clip and each image tile once, however many questions show it."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable

import torch

MAX_BYTES = 1 << 30  #: bytes of cached tokens

Encode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class VisionFeatureCache:
    """Least recently used tokens of clips and tiles, by a digest of their pixels. For models that are not trained.

        model.vision_cache = VisionFeatureCache(model.vision_tower, device)

    Pixels may be in the host's memory. They are compared there, and only those of new clips and tiles are copied.

    Args:
        encode: computes the tokens of clips and tiles that are not in the cache
            (:class:`framestream.trainer.model.vision_tower.VisionTower`).
        device: of ``encode`` and of the tokens.
        max_bytes: the oldest tokens are dropped above this size.
    """

    def __init__(self, encode: Encode, device: torch.device, max_bytes: int = MAX_BYTES) -> None:
        self._encode, self._device, self._max_bytes = encode, device, max_bytes
        self._tokens: collections.OrderedDict[bytes, torch.Tensor] = collections.OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
        """Return the tokens of clips, then of tiles.

        Args:
            clips: uint8 (n, T, S, S, 3).
            tiles: uint8 (m, S, S, 3).

        Returns:
            (n + m, 64, C); for n + m = 0, (1, 64, C) of the tower's dummy unit
        """
        n = len(clips)
        if not n + len(tiles):
            return self._encode(clips.to(self._device), tiles.to(self._device))
        digests = [_digest(unit) for unit in (*clips, *tiles)]
        missing = {digest: i for i, digest in enumerate(digests) if digest not in self._tokens}
        found = {digest: self._tokens[digest] for digest in digests if digest in self._tokens}
        if missing:
            # a dict: a unit that the batch shows twice is encoded once
            new_clips, new_tiles = [i for i in missing.values() if i < n], [i - n for i in missing.values() if i >= n]
            tokens = self._encode(clips[new_clips].to(self._device), tiles[new_tiles].to(self._device))
            found |= {digest: tokens[row].clone() for row, digest in enumerate(missing)}
        for digest in digests:
            self._put(digest, found[digest])
        return torch.stack([found[digest] for digest in digests])

    def _put(self, digest: bytes, tokens: torch.Tensor) -> None:
        if digest in self._tokens:
            self._tokens.move_to_end(digest)
            return
        self._tokens[digest] = tokens
        self._bytes += tokens.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._tokens.popitem(last=False)[1].nbytes


def _digest(pixels: torch.Tensor) -> bytes:
    """Digest the pixels of a clip or a tile; their numbers of bytes differ, so a clip is never taken for a tile."""
    return hashlib.blake2b(pixels.cpu().contiguous().numpy().reshape(-1).data, digest_size=16).digest()
