"""Remote locations: which host they need, and that a host that fails is given up."""

from __future__ import annotations

import threading

import pytest

from framestream.tools.fetch.base import FetchError
from framestream.tools.fetch.host_health import MAX_FAILURES, HostCircuitBreaker, host_of


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("hf:owner/name@main:folder", "hf:"),
        ("url:https://a.org/{path}", "https://a.org"),
        ("page:https://a.org/watch?v={stem}", "https://a.org"),
        ("s3://bucket/folder", "s3://bucket"),
        ("dir:/data", "dir:/data"),
    ],
)
def test_host(origin, host):
    assert host_of(origin) == host


class Asked:
    """Count calls, which fail for the given reason."""

    def __init__(self, reason: str) -> None:
        self.reason, self.count = reason, 0

    def __call__(self):
        self.count += 1
        if self.reason:
            raise FetchError(self.reason, f"file {self.count}", "failed")
        return self.count


def ask(hosts, origin, function, times=1, **options):
    messages = []
    for _ in range(times):
        with pytest.raises(FetchError) as caught:
            hosts.call(origin, function, **options)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("reason", ["unreachable", "timeout"])
def test_a_silent_host_is_given_up_for_all_its_locations(reason):
    hosts, asked, other = HostCircuitBreaker(), Asked(reason), Asked("")
    messages = ask(hosts, "url:https://a.org/x/{path}", asked, times=50)
    assert asked.count == MAX_FAILURES and set(messages) == {"file 1: failed"}
    assert ask(hosts, "url:https://a.org/y/{path}", asked) == ["file 1: failed"]
    assert asked.count == MAX_FAILURES and hosts.call("url:https://b.org/{path}", other) == 1


def test_an_answer_in_between_starts_the_count_again():
    hosts, asked, fine = HostCircuitBreaker(), Asked("unreachable"), Asked("")
    for _ in range(5):
        ask(hosts, "s3://b/x", asked, times=MAX_FAILURES - 1)
        hosts.call("s3://b/y", fine)
    assert asked.count == 5 * (MAX_FAILURES - 1)


def test_denied_is_about_the_source_and_missing_about_the_file():
    hosts, denied, missing = HostCircuitBreaker(), Asked("denied"), Asked("missing_file")
    ask(hosts, "hf:gated/set@1:", denied, times=50)
    ask(hosts, "hf:open/set@1:", missing, times=50)
    assert denied.count == MAX_FAILURES and missing.count == 50


def test_a_smaller_limit_of_failures():
    hosts, asked = HostCircuitBreaker(), Asked("unreachable")
    ask(hosts, "hf:a/b", asked, times=9, max_failures=1)
    assert asked.count == 1


def test_threads_that_fail_together_are_counted_together():
    hosts, asked, gate = HostCircuitBreaker(), Asked("unreachable"), threading.Barrier(MAX_FAILURES)

    def fail():
        gate.wait()
        return asked()

    threads = [threading.Thread(target=ask, args=(hosts, "hf:a/b", fail)) for _ in range(MAX_FAILURES)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert asked.count == MAX_FAILURES
    ask(hosts, "hf:c/d", asked)
    assert asked.count == MAX_FAILURES
