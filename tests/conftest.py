"""Shared settings of the tests: no time limit on single hypothesis examples, few examples, few threads."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background: commands under test inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "framestream", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("framestream")


def pytest_collection_modifyitems(items):
    """A golden file that is absent makes no test: golden tests without any case are left out, not skipped."""
    items[:] = [item for item in items if not (item.name.startswith("test_golden_") and "NOTSET" in item.name)]
