"""Retry an operation after failures that may pass."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol, TypeVar

Result = TypeVar("Result")


class TransientError(Exception):
    """A failure that may pass.

    Args:
        wait: seconds that the server asks to wait.
        retries: fewer retries than the policy allows; None for as many.
        progress: the attempt got further than all before it, so tries are counted again from 1.
    """

    def __init__(self, message: str, wait: float = 0.0, retries: int | None = None, progress: bool = False) -> None:
        super().__init__(message)
        self.wait, self.retries, self.progress = wait, retries, progress


Failure = TypeVar("Failure", bound=TransientError)
HandledFailure = TypeVar("HandledFailure", bound=TransientError, contravariant=True)


def count_tries(tries: int) -> str:
    """Return the number of tries as a message names it, such as ``3 tries``."""
    return "1 try" if tries == 1 else f"{tries} tries"


class RetryPolicy(Protocol[HandledFailure]):
    """Limits, waits and messages of :func:`call_with_retries`."""

    @property
    def retries(self) -> int:
        """Tries after the first."""

    def remaining(self) -> float:
        """Return the seconds left for all tries and waits together."""

    def delay(self, failure: HandledFailure, tries: int) -> float:
        """Return the seconds to wait after try number ``tries``."""

    def sleep(self, seconds: float) -> None:
        """Wait before the next try."""

    def final_error(self, failure: HandledFailure, tries: int, delay: float | None) -> Exception:
        """Return the error to raise if no tries are left (``delay`` is None) or no time for another one."""


def call_with_retries(attempt: Callable[[], Result], kind: type[Failure], policy: RetryPolicy[Failure]) -> Result:
    """Call ``attempt`` until it returns, again after every error of ``kind``.

    Raises:
        Exception: ``policy.final_error``, if no tries or no time are left; other errors of ``attempt`` unchanged.
    """
    tries = 0
    while True:
        try:
            return attempt()
        except kind as failure:
            tries = 1 if failure.progress else tries + 1
            allowed = policy.retries if failure.retries is None else min(policy.retries, failure.retries)
            if tries > allowed:
                raise policy.final_error(failure, tries, None) from None
            delay = policy.delay(failure, tries)
            if delay >= policy.remaining():
                raise policy.final_error(failure, tries, delay) from None
        policy.sleep(delay)  # outside of the handler, so that the traceback and its frames are freed


def backoff(base: float, longest: float, tries: int) -> float:
    """Return a random wait of up to ``base * 2**tries`` seconds, ``longest`` at most (exponential, full jitter)."""
    return random.uniform(0, min(base * 2**tries, longest))
