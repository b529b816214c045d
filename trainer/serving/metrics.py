"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)  #: limits of histogram bars
TYPE = "text/plain; version=0.0.4; charset=utf-8"  #: of the text that :meth:`ServingMetrics.render` returns


class ServingMetrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("framestream_requests", "Requests that ended", ["path", "status"], registry=registry)
        self.first_token = Histogram(
            "framestream_first_token_seconds", "From a request to its first token", buckets=SECONDS, registry=registry
        )
        self.answer_seconds = Histogram(
            "framestream_answer_seconds", "From a request to the end of its answer", buckets=SECONDS, registry=registry
        )
        self.prompt_tokens = Counter(
            "framestream_prompt_tokens", "Tokens of prompts, visual ones included", registry=registry
        )
        self.answer_tokens = Counter("framestream_answer_tokens", "Tokens of answers", registry=registry)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a value that is read when the metrics are."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def watch_count(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Show a count that only grows, and is read when the metrics are."""
        self._registry.register(_CountReader(name, text, value))

    def render(self) -> bytes:
        """Return all metrics as text."""
        return generate_latest(self._registry)


class _CountReader:
    """A collector of one counter."""

    def __init__(self, name: str, text: str, value: Callable[[], float]) -> None:
        self._name, self._text, self._value = name, text, value

    def collect(self) -> list[CounterMetricFamily]:
        return [CounterMetricFamily(self._name, self._text, value=self._value())]
