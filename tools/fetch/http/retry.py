"""How long, how large and how often: the limits on fetching one file, and trying again within them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from framestream.pipeline.config.data import DataConfig
from framestream.tools.fetch.base import FetchError

LONGEST_BACKOFF = 60.0  #: seconds between two tries where the server asks for none
LONGEST_ASKED = 300.0  #: seconds that a server may ask to wait (Retry-After)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits on one file; ``seconds`` counts all tries and the waits between them."""

    seconds: float = 1800.0
    bytes: int = 8 << 30
    retries: int = 6  #: tries after the first, counted anew whenever more of the file has arrived
    stall: float = 30.0  #: seconds without a byte, or without a connection, after which a try is given up
    backoff: float = 1.0  #: seconds; the wait before retry n is drawn evenly from 0 to backoff * 2**n

    @classmethod
    def from_manifest(cls, data: DataConfig) -> FetchLimits:
        """The limits that a manifest states."""
        return cls(seconds=data.fetch_timeout, bytes=data.fetch_mb << 20)

    def after(self, started: float, size: int) -> FetchLimits:
        """What is left for the rest of a folder, begun at ``started`` (time.monotonic()), of which ``size`` bytes
        have arrived."""
        return replace(self, seconds=self.seconds - (time.monotonic() - started), bytes=self.bytes - size)


class TransientFetchError(Exception):
    """A failure that may pass. It becomes a FetchError with ``reason`` when no tries are left.

    Args:
        wait: seconds that the server asks for.
        retries: fewer retries than the limits allow.
        progress: more of the file has arrived than ever before.
    """

    def __init__(
        self, reason: str, message: str, wait: float = 0.0, retries: int | None = None, progress: bool = False
    ) -> None:
        super().__init__(message)
        self.reason, self.wait, self.retries, self.progress = reason, wait, retries, progress


def with_retries(attempt: Callable[[float], T], place: object, limits: FetchLimits) -> T:
    """What ``attempt`` returns, called again after every :class:`Again` with exponential backoff and full jitter.

    ``attempt`` takes the deadline of all tries together, by time.monotonic().

    Raises:
        FetchError: with the reason of the last Again, or timeout.
    """
    deadline = time.monotonic() + limits.seconds
    tries = 0
    while True:
        try:
            return attempt(deadline)
        except TransientFetchError as again:
            tries = 1 if again.progress else tries + 1
            left = deadline - time.monotonic()
            if left <= 0:
                raise FetchError("timeout", place, f"{out_of_time(limits)}; {again}") from None
            if tries > (limits.retries if again.retries is None else min(limits.retries, again.retries)):
                raise FetchError(again.reason, place, f"{again} (try {tries})") from None
            wait = random.uniform(0, min(limits.backoff * 2**tries, LONGEST_BACKOFF))
            if again.wait:
                wait = min(again.wait, LONGEST_ASKED) + random.uniform(0, limits.backoff)
            if wait >= left:
                message = f"{again}; another try in {wait:.0f} s would be past data.fetch_timeout"
                raise FetchError(again.reason, place, message) from None
        time.sleep(wait)


def out_of_time(limits: FetchLimits) -> str:
    """The line of a time-out."""
    return f"took longer than data.fetch_timeout ({limits.seconds:g} s)"


def too_large(limits: FetchLimits, size: int | None = None) -> str:
    """The line of a file of ``size`` bytes, or of one that has no end."""
    what = "sent more than" if size is None else f"has {size} bytes, more than"
    return f"{what} data.fetch_mb allows ({limits.bytes} bytes)"
