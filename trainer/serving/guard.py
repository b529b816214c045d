"""What every request passes first: names of hosts, the API key, and bounds on bodies.

It works on the level of ASGI, so that a body is counted as it arrives, and that a refused one is never read.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.metrics import ServingMetrics

UPLOADS = "/v1/files"  #: path of uploads, which have a limit of their own
FORM_BYTES = 1 << 16  #: of a form besides its file
#: Sent with every response. The page loads nothing from elsewhere, and is shown in no frame.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def error_response(error: RequestError) -> JSONResponse:
    """Return the response of a refused request."""
    return JSONResponse(error.to_dict(), error.status, error.headers)


class RequestGuard:
    """Refuses requests before the application sees them, and counts the others."""

    def __init__(self, app: ASGIApp, config: ServingConfig, metrics: ServingMetrics) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._body_bytes = 0  # of all JSON bodies that are in memory

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, status = Headers(scope=scope), 0
        body = _BoundedBody(receive, headers, self._limit(scope["path"]), self._config.body_seconds)

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                await body.discard()
                more = _ENCODED if body.complete else [*_ENCODED, (b"connection", b"close")]  # the rest is not read
                message = {**message, "headers": [*message.get("headers", []), *more]}
            await send(message)

        try:
            try:
                self._check(scope, headers)
                body.check_length()
                reserved = self._reserve(scope, headers, body.limit)
            except RequestError as error:
                await error_response(error)(scope, receive, send_counted)
                return
            release = _Once(lambda: self._release(reserved))
            try:
                await self._app({**scope, "release_body": release}, body.receive, send_counted)
            finally:
                release()
        finally:
            self._metrics.requests.labels(_route(scope), str(status or 499)).inc()

    def _limit(self, path: str) -> int:
        config = self._config
        return config.max_upload_bytes + FORM_BYTES if path == UPLOADS else config.max_request_bytes

    def _reserve(self, scope: Scope, headers: Headers, limit: int) -> int:
        """Count the bytes that a JSON body may have."""
        if scope["method"] != "POST" or scope["path"] == UPLOADS:
            return 0
        size = int(headers.get("content-length", limit))
        if self._body_bytes + size > self._config.max_bodies_bytes:
            text = "too many large requests at the same time; try again later"
            raise RequestError(429, text, "too_many_bytes", retry_after=1)
        self._body_bytes += size
        return size

    def _release(self, size: int) -> None:
        self._body_bytes -= size

    def _check(self, scope: Scope, headers: Headers) -> None:
        """Refuse other hosts, pages of other hosts, and wrong keys.

        A page of another host must not use a server that only listens on this machine: neither by its own name that it
        points here (``Host``), nor by a form (``Origin``).
        """
        host, origin = headers.get("host", ""), headers.get("origin")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._config.hosts and name not in self._config.hosts:
            text = f"this server answers only as {', '.join(self._config.hosts)}; see --host"
            raise RequestError(403, text, "wrong_host")
        if origin is not None and origin.partition("://")[2] != host:
            raise RequestError(403, "pages of other hosts may not use this server", "wrong_origin")
        key = self._config.api_key
        if not key or not scope["path"].startswith(("/v1/", "/metrics")):
            return
        given = headers.get("authorization", "")
        scheme, _, token = given.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), key.encode()):
            text = "the API key is missing or wrong; send Authorization: Bearer KEY"
            raise RequestError(401, text, "invalid_api_key")


class _Once:
    """A function that has an effect at its first call only."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function: Callable[[], None] | None = function

    def __call__(self) -> None:
        function, self._function = self._function, None
        if function is not None:
            function()


class _BoundedBody:
    """The body of a request: its bytes are counted, and may not stop for too long."""

    def __init__(self, receive: Receive, headers: Headers, limit: int, seconds: float) -> None:
        self._receive, self._headers, self.limit, self._seconds = receive, headers, limit, seconds
        self._bytes = 0
        #: whether nothing of it will follow
        self.complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers

    def check_length(self) -> None:
        """Refuse a body by the length that its sender states."""
        length = self._headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 20 or int(length) > self.limit:
            raise self._too_large()

    async def discard(self) -> None:
        """Read the rest of a body of a permitted length: its sender may not look at the response before."""
        length = self._headers.get("content-length", "")
        with suppress(RequestError):
            while not self.complete and length.isdecimal() and int(length[:20]) <= self.limit:
                await self.receive()

    async def receive(self) -> Message:
        """Return the next message of the request."""
        if self.complete:
            return await self._receive()
        try:
            message: MutableMapping[str, Any] = await asyncio.wait_for(self._receive(), self._seconds)
        except asyncio.TimeoutError:
            raise RequestError(408, "the body of the request did not arrive; send it again", "body_timeout") from None
        self._bytes += len(message.get("body", b""))
        self.complete = not message.get("more_body", False)
        if self._bytes > self.limit:
            raise self._too_large()
        return message

    def _too_large(self) -> RequestError:
        text = f"the request has over {self.limit:,} bytes; send less, or upload files one by one to {UPLOADS}"
        return RequestError(413, text, "request_too_large")


def _route(scope: Scope) -> str:
    """Return the path of a request for metrics, without ids."""
    path = scope["path"]
    if path.startswith(f"{UPLOADS}/"):
        return f"{UPLOADS}/{{id}}/frames" if path.endswith("/frames") else f"{UPLOADS}/{{id}}"
    return path if path in KNOWN else "other"


KNOWN = ("/", "/page.css", "/page.js", "/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions", UPLOADS)
_ENCODED = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
