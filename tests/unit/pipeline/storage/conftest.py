"""A small root and the servers that it is read from."""

from __future__ import annotations

import pytest

from framestream.pipeline.storage import remote
from tests.helpers.corpora.small_root import mixed_root
from tests.helpers.servers.web_server import Server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Requests to 127.0.0.1 go there, and waits between tries are short."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("framestream.pipeline.storage.http.BACKOFF", 0.002)
    yield
    for idle in remote._shared.client.connections._idle.values():
        while idle:
            idle.pop().close()


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """The folder that holds stage2; nobody writes to its shards."""
    return mixed_root(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def server():
    """A server without files."""
    with Server() as running:
        yield running


@pytest.fixture
def served(server, root):
    """A server with the files of ``root``."""
    serve_folder(server, root)
    return server


def serve_folder(server, folder, prefix=""):
    """Serve every file below ``folder`` as it is when it is asked for."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith("tokens-"):
            route = f"{prefix}/{path.relative_to(folder).as_posix()}"
            server.routes[route] = lambda request, path=path: request.serve(path.read_bytes())
