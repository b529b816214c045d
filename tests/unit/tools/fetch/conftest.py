"""Fixtures of the fetch tests: a server for each test, and no proxy."""

from __future__ import annotations

import pytest

from tests.helpers.servers.web_server import Server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Unset proxies, so that requests to 127.0.0.1 are direct."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    """Start a server without files."""
    with Server() as running:
        yield running
