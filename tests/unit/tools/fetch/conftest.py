"""A server for each test, and no proxy between."""

from __future__ import annotations

import pytest

from tests.helpers.servers.web_server import Server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Requests to 127.0.0.1 go there."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    """A server without files."""
    with Server() as running:
        yield running
