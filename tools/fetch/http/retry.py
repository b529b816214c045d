"""Limits on time, size and retries of fetching one file."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from framestream.pipeline.config.data import DataConfig
from framestream.pipeline.utils.retry import TransientError, backoff, call_with_retries, count_tries
from framestream.tools.fetch.base import FetchError

MAX_BACKOFF = 60.0  #: seconds between two tries, unless the server asks for a wait
MAX_RETRY_AFTER = 300.0  #: seconds, at most, that a wait asked for by the server (Retry-After) is followed

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Limits on fetching one file."""

    seconds: float = 1800.0  #: for all tries and the waits between them
    bytes: int = 8 << 30
    retries: int = 6  #: tries after the first; the count restarts whenever more of the file has arrived
    stall: float = 30.0  #: seconds without a byte, or without a connection, after which a try ends
    backoff: float = 1.0  #: seconds; the wait before retry n is uniform between 0 and backoff * 2**n

    @classmethod
    def from_manifest(cls, data: DataConfig) -> FetchLimits:
        """Return the limits of a manifest."""
        return cls(seconds=data.fetch_timeout, bytes=data.fetch_mb << 20)

    def subtract_used(self, started: float, size: int) -> FetchLimits:
        """Return the limits for the remaining files of a folder.

        Args:
            started: when the first file was started, by time.monotonic().
            size: bytes of the folder that have arrived.
        """
        return replace(self, seconds=self.seconds - (time.monotonic() - started), bytes=self.bytes - size)


class TransientFetchError(TransientError):
    """A failure that may pass. It becomes a FetchError with ``reason`` when no tries are left.

    Args:
        wait: seconds that the server asks to wait.
        retries: fewer retries than the limits allow.
        progress: more of the file has arrived than ever before.
    """

    def __init__(
        self, reason: str, message: str, wait: float = 0.0, retries: int | None = None, progress: bool = False
    ) -> None:
        super().__init__(message, wait, retries, progress)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class _FetchRetries:
    """The retry policy of one file (see :class:`framestream.pipeline.utils.retry.RetryPolicy`)."""

    location: object
    limits: FetchLimits
    deadline: float  #: by time.monotonic()

    @property
    def retries(self) -> int:
        return self.limits.retries

    def remaining(self) -> float:
        return self.deadline - time.monotonic()

    def delay(self, failure: TransientFetchError, tries: int) -> float:
        if failure.wait:
            return min(failure.wait, MAX_RETRY_AFTER) + random.uniform(0, self.limits.backoff)
        return backoff(self.limits.backoff, MAX_BACKOFF, tries)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def final_error(self, failure: TransientFetchError, tries: int, delay: float | None) -> FetchError:
        if self.remaining() <= 0:
            return FetchError("timeout", self.location, f"{timeout_message(self.limits)}; {failure}")
        if delay is None:
            return FetchError(failure.reason, self.location, f"{failure} ({count_tries(tries)})")
        message = f"{failure}; another try in {delay:.0f} s would be past data.fetch_timeout"
        return FetchError(failure.reason, self.location, message)


def with_retries(attempt: Callable[[float], T], location: object, limits: FetchLimits) -> T:
    """Call ``attempt`` again after every :class:`TransientFetchError`, with exponential backoff and full jitter.

    ``attempt`` takes the deadline of all tries together, by time.monotonic().

    Raises:
        FetchError: with the reason of the last failure, or timeout.
    """
    deadline = time.monotonic() + limits.seconds
    return call_with_retries(lambda: attempt(deadline), TransientFetchError, _FetchRetries(location, limits, deadline))


def timeout_message(limits: FetchLimits) -> str:
    """Return the message of a fetch that took too long."""
    return f"took longer than data.fetch_timeout ({limits.seconds:g} s)"


def too_large_message(limits: FetchLimits, size: int | None = None) -> str:
    """Return the message of a file that is too large; ``size`` is its size in bytes, None if it is not known."""
    what = "sent more than" if size is None else f"has {size} bytes, more than"
    return f"{what} data.fetch_mb allows ({limits.bytes} bytes)"
