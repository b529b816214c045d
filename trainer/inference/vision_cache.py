"""Clips and stills that are encoded once, however many questions show them."""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Callable

import torch

MAX_BYTES = 1 << 30  #: bytes of what is kept

Encode = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class VisionFeatureCache:
    """In place of :meth:`framestream.trainer.model.video_llm.VideoLLM.encode` where nothing is learned: what was encoded lately,
    told by its pixels, is not encoded again.

    model.encode = Encoded(model.encode)
    """

    def __init__(self, encode: Encode, room: int = MAX_BYTES) -> None:
        self._encode, self._room = encode, room
        self._kept: collections.OrderedDict[bytes, torch.Tensor] = collections.OrderedDict()
        self._bytes = 0

    @torch.no_grad()
    def __call__(self, clips: torch.Tensor, stills: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As of ``encode``: uint8 (n, T, S, S, 3) and (m, S, S, 3) to (n, 64, C) and (m, 64, C)."""
        names = [_digest(unit) for unit in (*clips, *stills)]
        n = len(clips)
        fresh = {name: i for i, name in enumerate(names) if name not in self._kept}
        found = {name: self._kept[name] for name in names if name in self._kept}
        if fresh:
            of_clips, of_stills = [i for i in fresh.values() if i < n], [i - n for i in fresh.values() if i >= n]
            tokens = torch.cat(self._encode(clips[of_clips], stills[of_stills]))
            found |= {name: tokens[place].clone() for place, name in enumerate(fresh)}
        for name in names:
            self._keep(name, found[name])
        tokens = torch.stack([found[name] for name in names])
        return tokens[:n], tokens[n:]

    def _keep(self, name: bytes, tokens: torch.Tensor) -> None:
        if name in self._kept:
            self._kept.move_to_end(name)
            return
        self._kept[name] = tokens
        self._bytes += tokens.nbytes
        while self._bytes > self._room:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes


def _digest(pixels: torch.Tensor) -> bytes:
    """Of a clip's or a still's pixels; clips and stills have different shapes, so different numbers of bytes."""
    return hashlib.blake2b(memoryview(pixels.cpu().contiguous().numpy()).cast("B"), digest_size=16).digest()
