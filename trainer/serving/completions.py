"""Answers in the form of the OpenAI API: one JSON body, or a stream of events."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from framestream.trainer.serving.engine import AnswerEvent
from framestream.trainer.serving.errors import RequestError

DONE = b"data: [DONE]\n\n"  #: the last event of a stream
Events = AsyncIterator[AnswerEvent]


class CompletionFormat:
    """The JSON objects of one completion."""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self._model, self._include_usage = model, include_usage
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        known = {"id": self._id, "object": kind, "created": self._created, "model": self._model}
        return {**known, "choices": choices}

    def complete(self, text: str, end: AnswerEvent) -> dict[str, Any]:
        """Return the body of a response with the complete answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish_reason}
        return {**self._object("chat.completion", [choice]), "usage": token_usage(end)}

    async def stream(self, events: Events) -> AsyncIterator[bytes]:
        """Yield the events of a streamed answer, as server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""})
        try:
            async for event in events:
                if event.text:
                    yield self._chunk({"content": event.text})
                if event.finish_reason:
                    yield self._chunk({}, event.finish_reason)
                    if self._include_usage:
                        yield _event({**self._object("chat.completion.chunk", []), "usage": token_usage(event)})
        except RequestError as error:  # the status was sent before
            yield _event(error.to_dict())
        yield DONE

    def _chunk(self, delta: dict[str, str], reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        extra = {"usage": None} if self._include_usage else {}
        return _event({**self._object("chat.completion.chunk", [choice]), **extra})


def token_usage(end: AnswerEvent) -> dict[str, int]:
    """Return the numbers of tokens; those of a prompt include visual ones."""
    total = end.prompt_tokens + end.answer_tokens
    return {"prompt_tokens": end.prompt_tokens, "completion_tokens": end.answer_tokens, "total_tokens": total}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """A response of server-sent events, which ends when its client is gone.

    Args:
        events: the events, with the line ends that follow them.
        close: called in the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        self.status_code, self.background = 200, None
        self._events, self._close = events, close
        self.init_headers({"x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end, or the client is gone."""
        try:
            await until_disconnect(self._send_events(send), receive)
        finally:
            self._close()

    async def _send_events(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_disconnect(work: Awaitable[Any], receive: Receive) -> Any:
    """Return what ``work`` returns, or None if the client is gone before; ``work`` is then cancelled."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_wait_for_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
