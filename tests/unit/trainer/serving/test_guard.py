"""Requests that never reach the application: other hosts and origins, wrong keys, and bodies beyond their bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.guard import RequestGuard, error_response
from framestream.trainer.serving.metrics import ServingMetrics

KEY = "k" * 20


async def count(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


async def refuse(request, error):
    return error_response(error)


def send(method: str, path: str, config: ServingConfig, **options) -> httpx2.Response:
    """Send a request to an application behind the guard."""
    routes = [Route("/{path:path}", count, methods=["GET", "POST"])]
    metrics = ServingMetrics()
    guard = Middleware(RequestGuard, config=config, metrics=metrics)
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={RequestError: refuse})

    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def refusal(response: httpx2.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/chat/completions", "/metrics"])
@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", f"Basic {KEY}", KEY, "Bearer ", f"Bearer {KEY}x", "Bearer \xe9"]
)
def test_a_wrong_key_is_refused(path, given):
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    response = send("GET", path, ServingConfig(api_key=KEY), headers=headers)
    assert refusal(response) == (401, "invalid_api_key") and response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/page.js"])
def test_the_page_and_health_need_no_key(path):
    assert send("GET", path, ServingConfig(api_key=KEY)).status_code == 200


def test_the_right_key_is_accepted():
    for given in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert (
            send("GET", "/v1/models", ServingConfig(api_key=KEY), headers={"authorization": given}).status_code == 200
        )


@pytest.mark.parametrize(
    ("host", "allowed"),
    [("127.0.0.1:8000", True), ("localhost", True), ("[::1]:80", True), ("evil.example:8000", False), ("", False)],
)
def test_a_local_server_answers_only_to_its_own_names(host, allowed):
    config = ServingConfig(hosts=("127.0.0.1", "localhost", "[::1]"))
    response = send("GET", "/", config, headers={"host": host})
    assert response.status_code == 200 if allowed else refusal(response) == (403, "wrong_host")
    assert send("GET", "/", ServingConfig(), headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9000"])
def test_pages_of_other_hosts_are_refused(origin):
    assert refusal(send("POST", "/v1/files", ServingConfig(), headers={"origin": origin})) == (403, "wrong_origin")
    assert send("POST", "/", ServingConfig(), headers={"origin": "http://127.0.0.1:8000"}).status_code == 200


async def parts(size: int, count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * size


@pytest.mark.parametrize(("path", "limit"), [("/v1/chat/completions", 1000), ("/v1/files", 5000 + (1 << 16))])
def test_bodies_are_bounded_stated_or_streamed(path, limit):
    config = ServingConfig(max_request_bytes=1000, max_upload_bytes=5000)
    assert send("POST", path, config, content=b"x" * limit).text == str(limit)
    assert refusal(send("POST", path, config, content=b"x" * (limit + 1))) == (413, "request_too_large")
    assert send("POST", path, config, content=parts(limit // 10, 10)).text == str(limit // 10 * 10)
    assert refusal(send("POST", path, config, content=parts(limit // 10 + 1, 10))) == (413, "request_too_large")


def test_a_body_of_ten_gigabytes_is_refused_by_its_length():
    """Not a byte of it is read: the application would wait for it for ever."""
    headers = {"content-length": str(10 << 30)}
    assert refusal(send("POST", "/v1/files", ServingConfig(), headers=headers, content=b"")) == (
        413,
        "request_too_large",
    )
    for length in ("-1", "x", "9" * 30):
        response = send("POST", "/v1/files", ServingConfig(), headers={"content-length": length}, content=b"")
        assert response.status_code == 413


def test_a_body_that_stops_is_left():
    async def stalled() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)

    response = send("POST", "/v1/files", ServingConfig(body_seconds=0.05), content=stalled())
    assert refusal(response) == (408, "body_timeout")


def test_bodies_in_memory_are_bounded_together():
    config, metrics = ServingConfig(max_request_bytes=1000), ServingMetrics()

    async def run() -> list[int]:
        leave, held = asyncio.Event(), 0

        async def hold(request: Request) -> PlainTextResponse:
            nonlocal held
            await request.body()
            held += 1
            if request.url.path == "/free":
                request.scope["release_body"]()
            await leave.wait()
            return PlainTextResponse("")

        guard = Middleware(RequestGuard, config=config, metrics=metrics)
        app = Starlette(routes=[Route("/{path:path}", hold, methods=["POST"])], middleware=[guard])
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://x") as client:
            running = []
            for path in ["/free"] * 6 + ["/kept"] * 4:
                running.append(asyncio.create_task(client.post(path, content=b"x" * 1000)))
                while held < len(running):
                    await asyncio.sleep(0.001)
            refused = await asyncio.wait_for(client.post("/kept", content=b"x" * 1000), 10)
            leave.set()
            return [refused.status_code, *[(await task).status_code for task in running]]

    assert asyncio.run(run()) == [429, *[200] * 10]


def test_the_rest_of_a_refused_body_is_read_if_it_is_not_too_long():
    """A connection that closes with unread bytes is reset, and its client may never see the response."""
    config = ServingConfig(api_key=KEY, max_request_bytes=1000)
    for content, closes in ((b"x" * 1000, False), (b"x" * 1001, True), (parts(10, 3), True), (b"", False)):
        response = send("POST", "/v1/chat/completions", config, content=content)
        assert response.status_code == 401 and (response.headers.get("connection") == "close") == closes


def test_every_response_has_the_headers_of_a_closed_page():
    for path, config in (("/", ServingConfig()), ("/v1/models", ServingConfig(api_key=KEY))):
        headers = send("GET", path, config).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
