"""Addresses that clients name: only public ones are reached, each redirect is checked, and files are bounded."""

from __future__ import annotations

import socket

import pytest

from framestream.trainer.serving import fetch
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.fetch import fetch_file, is_public
from tests.helpers.servers.web_server import Server


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd00:ec2::254",
        "fec0::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::1",
        "2002:7f00:1::",
        "2001:0:4136:e378::1",
        "2001:db8::1",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


def read(url: str, max_bytes: int = 1000, seconds: float = 10) -> bytes:
    with fetch_file(url, "file", max_bytes, seconds) as body:
        return b"".join(iter(lambda: body.read(1 << 16), b""))


@pytest.fixture
def server():
    with Server() as server:
        yield server


@pytest.fixture
def named(server, monkeypatch):
    """The server under the name media.example, as if its number were public; returns its address."""
    port = server.url.rpartition(":")[2]
    resolve = fetch.resolve_public

    def pretend(host, number, param):
        return "127.0.0.1" if host == "media.example" else resolve(host, number, param)

    monkeypatch.setattr(fetch, "resolve_public", pretend)
    return f"http://media.example:{port}"


def test_a_file_is_fetched_under_its_own_name(server, named):
    server.routes["/a.mp4"] = lambda request: request.answer(body=b"film")
    assert read(f"{named}/a.mp4?x=1") == b"film"
    ((path, headers),) = server.asked
    assert path == "/a.mp4?x=1" and headers["host"] == named.removeprefix("http://")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "0x7f.1", "127.1"])
def test_this_machine_is_not_reached(server, host):
    port = server.url.rpartition(":")[2]
    with pytest.raises(RequestError) as refused:
        read(f"http://{host}:{port}/a.mp4")
    assert refused.value.code in ("address_not_allowed", "invalid_url") and not server.asked


@pytest.mark.parametrize("target", ["http://127.0.0.1:{port}/secret", "http://169.254.169.254/", "file:///etc/passwd"])
def test_a_redirect_is_checked_like_an_address(server, named, target):
    port = named.rpartition(":")[2]
    server.routes["/a"] = lambda request: request.answer(302, Location=target.format(port=port))
    server.routes["/secret"] = lambda request: request.answer(body=b"secret")
    with pytest.raises(RequestError) as refused:
        read(f"{named}/a")
    assert refused.value.code in ("address_not_allowed", "invalid_url")
    assert [path for path, _ in server.asked] == ["/a"]


def test_redirects_are_followed_and_counted(server, named):
    server.routes["/a"] = lambda request: request.answer(302, Location="/b")
    server.routes["/b"] = lambda request: request.answer(body=b"film")
    server.routes["/loop"] = lambda request: request.answer(302, Location="/loop")
    assert read(f"{named}/a") == b"film"
    with pytest.raises(RequestError, match="redirects"):
        read(f"{named}/loop")


def test_a_name_is_resolved_once(monkeypatch):
    """A second answer of the name server, with a private number, is never asked for."""
    answers = iter([["93.184.216.34"], ["127.0.0.1"]])

    def resolve(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, port)) for number in next(answers)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with fetch.httpx2.Client(trust_env=False) as client:
        request = fetch._pinned_request(client, "https://media.example/a", "file")
    assert request.url.host == "93.184.216.34" and request.headers["host"] == "media.example"
    assert request.extensions["sni_hostname"] == "media.example"


def test_a_name_with_any_private_number_is_refused(monkeypatch):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 80)) for number in ("8.8.8.8", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(RequestError, match="not a public one"):
        read("http://media.example/a")


@pytest.mark.parametrize(
    "url", ["http://user:word@media.example/a", "http:///a", "http://media.example:99999/a", "ftp://media.example/a"]
)
def test_other_addresses_are_refused(named, url):
    with pytest.raises(RequestError) as refused:
        read(url)
    assert refused.value.code == "invalid_url"


@pytest.mark.parametrize(
    ("answer", "status", "why"),
    [
        (lambda request: request.answer(body=b"x" * 1001), 413, "over 1,000 bytes"),
        (lambda request: request.answer(404), 400, "status 404"),
        (lambda request: request.answer(body=b"x", length=900), 400, "cannot be fetched"),
        (lambda request: request.reset(), 400, "cannot be fetched"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(server, named, answer, status, why):
    server.routes["/a"] = answer
    with pytest.raises(RequestError, match=why) as refused:
        read(f"{named}/a")
    assert refused.value.status == status and "\n" not in refused.value.message


def test_a_body_without_a_length_is_counted(server, named):
    def endless(request):
        request.send_response(200)
        request.send_header("Connection", "close")
        request.end_headers()
        for _ in range(100):
            request.wfile.write(b"x" * 1000)

    server.routes["/a"] = endless
    with pytest.raises(RequestError) as refused:
        read(f"{named}/a")
    assert refused.value.status == 413


def test_a_file_that_never_ends_is_left(server, named):
    def slow(request):
        request.send_response(200)
        request.send_header("Content-Length", "100")
        request.end_headers()
        while not server.closing.wait(0.05):
            request.wfile.write(b"x")
            request.wfile.flush()

    server.routes["/a"] = slow
    with pytest.raises(RequestError, match="too long"):
        read(f"{named}/a", seconds=0.3)
