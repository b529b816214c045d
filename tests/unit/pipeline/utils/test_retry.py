"""Retries: how often, how long, and with which error they end."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from framestream.pipeline.utils.retry import TransientError, backoff, call_with_retries


@dataclass
class Policy:
    """Ten seconds in all, two before each try; the error lists why the retries ended."""

    retries: int = 3
    seconds: float = 10.0
    slept: list[float] = field(default_factory=list)

    def remaining(self) -> float:
        return self.seconds - sum(self.slept)

    def delay(self, failure: TransientError, tries: int) -> float:
        return failure.wait or 2.0

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    def final_error(self, failure: TransientError, tries: int, delay: float | None) -> Exception:
        return RuntimeError(f"{failure} after {tries}, {delay}")


def attempts(*failures: Exception):
    rest = iter(failures)

    def attempt() -> str:
        for failure in rest:
            raise failure
        return "done"

    return attempt


def test_a_failure_that_passes_is_retried() -> None:
    policy = Policy()
    assert call_with_retries(attempts(*[TransientError("busy")] * 3), TransientError, policy) == "done"
    assert policy.slept == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("policy", "failure", "count", "message"),
    [
        (Policy(), TransientError("busy"), 4, "busy after 4, None"),
        (Policy(), TransientError("gone", retries=0), 1, "gone after 1, None"),
        (Policy(), TransientError("gone", retries=9), 4, "gone after 4, None"),
        (Policy(seconds=5), TransientError("slow"), 4, "slow after 3, 2.0"),
        (Policy(), TransientError("later", wait=60), 1, "later after 1, 60"),
    ],
)
def test_retries_end_with_one_error(policy: Policy, failure: TransientError, count: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}$") as caught:
        call_with_retries(attempts(*[failure] * count), TransientError, policy)
    assert caught.value.__suppress_context__


def test_progress_counts_the_tries_again() -> None:
    failures = [TransientError("cut"), *[TransientError("cut", progress=True)] * 2, TransientError("cut")]
    policy = Policy(retries=2, seconds=100)
    assert call_with_retries(attempts(*failures), TransientError, policy) == "done"


def test_other_errors_are_not_retried() -> None:
    policy = Policy()
    with pytest.raises(KeyError):
        call_with_retries(attempts(KeyError("x")), TransientError, policy)
    assert not policy.slept


def test_backoff_doubles_up_to_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, high: (low, high))
    assert [backoff(0.5, 5, tries) for tries in (1, 2, 3, 4, 5)] == [(0, 1), (0, 2), (0, 4), (0, 5), (0, 5)]
