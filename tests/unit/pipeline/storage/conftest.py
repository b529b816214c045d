"""A small root and the servers that it is read from."""

from __future__ import annotations

import random
import time

import pytest

from framestream.pipeline.storage import ShardRef, remote
from tests.helpers.corpora.small_root import mixed_root
from tests.helpers.servers.web_server import Server

DATA = random.Random(0).randbytes(300_000)
FILE = ShardRef("file.tar", len(DATA), "")
RANGES = [(5, 18_000), (100_000, 20_000), (250_000, 50_000), (120_000, 1)]
EXPECTED = [DATA[offset : offset + size] for offset, size in RANGES]
#: routes of servers that refuse or fail for good, with the error and its message
REFUSALS = [
    (lambda request: request.answer(body=DATA), ValueError, "cannot send parts of a file"),
    (lambda request: request.answer(404), FileNotFoundError, "404 Not Found"),
    (lambda request: request.answer(401), PermissionError, "401 Unauthorized"),
    (lambda request: request.answer(403), PermissionError, r"403 Forbidden.*\(3 tries\)"),
    (lambda request: request.answer(418), ValueError, "418"),
    (
        lambda request: request.answer(301, x_amz_bucket_region="eu-1"),
        ValueError,
        "region eu-1; set AWS_REGION=eu-1",
    ),
    (lambda request: request.answer(500), ConnectionError, r"500 Internal Server Error \(3 tries\)"),
    (lambda request: request.answer(429, Retry_After="60"), ConnectionError, "loader.read_timeout"),
    (lambda request: request.reset(), ConnectionError, "the connection broke"),
    (lambda request: request.serve(DATA[:-1]), ValueError, "has 299,999 of 300,000 bytes; copy"),
    (
        lambda request: request.answer(206, b"x", Content_Range=f"bytes {request.wanted(DATA)[0]}-/*"),
        ValueError,
        "does not state the size",
    ),
    (lambda request: request.serve(DATA, Content_Encoding="gzip"), ValueError, r"compressed \(gzip\)"),
    (lambda request: request.answer(302, Location="file:///etc/passwd"), ConnectionError, "from http: to file:"),
    (lambda request: request.answer(302, Location="/file.tar"), ValueError, "redirects more than"),
]


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


def drip(request):
    """A head, then a byte now and then."""
    request.send_response(206)
    request.send_header("Content-Range", f"bytes {request.wanted(DATA)[0]}-299999/{len(DATA)}")
    request.end_headers()
    for _ in range(600):
        request.wfile.write(b".")
        request.wfile.flush()
        time.sleep(0.05)


def drip_head(request):
    """A head that does not end."""
    request.wfile.write(b"HTTP/1.1 206 Partial Content\r\n")
    for _ in range(600):
        request.wfile.write(b"A: b\r\n")
        request.wfile.flush()
        time.sleep(0.05)
