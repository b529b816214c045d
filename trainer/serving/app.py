"""The routes of the server."""

from __future__ import annotations

import asyncio
import base64
import functools
import io
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.inference.generation import Sampling
from framestream.trainer.inference.predictor import Predictor
from framestream.trainer.serving.completions import CompletionFormat, EventStream, until_disconnect
from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.engine import AnswerEvent, AnswerRequest, ServingEngine
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.guard import FORM_BYTES, UPLOADS, RequestGuard, error_response
from framestream.trainer.serving.media import RequestMedia, ShownMedia, receive_media
from framestream.trainer.serving.metrics import TYPE, ServingMetrics
from framestream.trainer.serving.requests import MAX_SECOND, ChatRequest, MediaReference, parse_chat_request, to_turns
from framestream.trainer.serving.uploads import UploadedFile, UploadStore

PAGE = Path(__file__).parent
TRANSFERS = 4  #: uploads, and strips of frames, at the same time
THUMBNAIL = 160  #: pixels along a side of a frame in a strip
CLIENT_GONE = 499  #: status of a response that nobody receives, as in nginx

Handler = Callable[[Request], Awaitable[Response]]


def create_app(predictor: Predictor, manifest: Manifest, config: ServingConfig) -> Starlette:
    """Return the application. Its lifespan starts and ends the engine.

    Args:
        predictor: the model that answers.
        manifest: the one that ``predictor`` was made with.
    """
    return _Server(predictor, manifest, config).application()


class _Server:
    """Handlers of the routes, and what they share."""

    def __init__(self, predictor: Predictor, manifest: Manifest, config: ServingConfig) -> None:
        self._config, self._manifest, self._metrics = config, manifest, ServingMetrics()
        self._engine = ServingEngine(predictor, manifest, config, self._metrics)
        self._store = UploadStore(config.store_bytes)
        self._transfers = 0
        engine, cache = self._engine, self._engine.cache
        watch, count = self._metrics.watch, self._metrics.watch_count
        watch("framestream_waiting_requests", "Requests that do not grow yet", lambda: engine.num_waiting)
        watch("framestream_running_requests", "Answers that grow", lambda: engine.num_running)
        watch("framestream_visual_cache_bytes", "Bytes of kept visual tokens", lambda: cache.nbytes)
        watch("framestream_store_bytes", "Bytes of files on the disk", lambda: self._store.nbytes)
        count("framestream_visual_cache_hits", "Media whose visual tokens were kept", lambda: cache.hits)
        count("framestream_visual_cache_misses", "Media that were encoded", lambda: cache.misses)

    def application(self) -> Starlette:
        """Return the application."""
        handlers: list[tuple[str, str, Handler]] = [
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._model),
            ("POST", "/v1/chat/completions", self._complete),
            ("POST", UPLOADS, self._upload),
            ("GET", UPLOADS, self._list_uploads),
            ("GET", f"{UPLOADS}/{{id}}", self._describe_upload),
            ("DELETE", f"{UPLOADS}/{{id}}", self._remove_upload),
            ("GET", f"{UPLOADS}/{{id}}/frames", self._frames),
            ("GET", "/health", self._health),
            ("GET", "/ready", self._ready),
            ("GET", "/metrics", self._show_metrics),
        ]
        routes = [Route(path, handler, methods=[method]) for method, path, handler in handlers]
        for path, name in (("/", "page.html"), ("/page.css", "page.css"), ("/page.js", "page.js")):
            routes.append(Route(path, functools.partial(_static, name), methods=["GET"]))
        return Starlette(
            routes=routes,
            lifespan=self._lifespan,
            middleware=[Middleware(RequestGuard, config=self._config, metrics=self._metrics)],
            exception_handlers={RequestError: _refuse, HTTPException: _refuse_http, Exception: _refuse_unexpected},
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(self._engine.close)
            self._store.close()

    # models and state -------------------------------------------------------------------------------------------------

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        limit = self._manifest.model.language_model.max_position_embeddings
        return {
            "id": self._config.model_name,
            "object": "model",
            "created": 0,
            "owned_by": "framestream",
            "max_model_len": limit,
        }

    def _check_model(self, name: str) -> None:
        if name != self._config.model_name:
            text = f"there is no model {name[:100]!r}; this server has {self._config.model_name!r}"
            raise RequestError(404, text, "model_not_found", "model")

    async def _health(self, request: Request) -> Response:
        alive = self._engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def _ready(self, request: Request) -> Response:
        self._engine.check_room()
        return JSONResponse({"status": "ready"})

    async def _show_metrics(self, request: Request) -> Response:
        return Response(self._metrics.render(), media_type=TYPE)

    # chat completions -------------------------------------------------------------------------------------------------

    async def _complete(self, request: Request) -> Response:
        self._engine.check_room()  # before the body is read
        media: list[RequestMedia] = []
        answers: list[AnswerRequest] = []

        def close() -> None:
            for answer in answers:
                self._engine.cancel(answer)
            for item in media:
                self._store.release(item.file)

        try:
            chat = await self._read_chat(request, media)
            answers.append(chat.answer)
            self._engine.submit(chat.answer)
            first = await until_disconnect(self._next_event(chat.answer), request.receive)
            if first is None:
                raise ClientDisconnect
            if chat.stream:
                return EventStream(chat.form.stream(self._events(first, chat.answer)), close)
            pieces = await until_disconnect(self._collect(first, chat.answer), request.receive)
            if pieces is None:
                raise ClientDisconnect
            close()
            return JSONResponse(chat.form.complete("".join(piece.text for piece in pieces), pieces[-1]))
        except ClientDisconnect:
            close()
            return Response(status_code=CLIENT_GONE)
        except BaseException:
            close()
            raise

    async def _read_chat(self, request: Request, media: list[RequestMedia]) -> _Chat:
        """Read the body of a request, and put its media on the disk; ``media`` receives them."""
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "send the request as application/json", "wrong_content_type")
        body = b"".join([part async for part in request.stream()])
        chat = await run_in_threadpool(parse_chat_request, body)
        self._check_model(chat.model)
        turns, references = to_turns(chat)
        self._check_counts(references)
        sampling, max_tokens = _sampling(chat), self._max_tokens(chat)
        for reference in references:
            media.append(await run_in_threadpool(receive_media, reference, self._store, self._config))
        request.scope["release_body"]()  # only the turns are kept while the request waits
        frames, options = chat.media_io_kwargs.video.num_frames, chat.stream_options
        answer = AnswerRequest(turns, media, sampling, max_tokens, chat.stops, frames)
        form = CompletionFormat(chat.model, bool(options and options.include_usage))
        return _Chat(answer, form, bool(chat.stream))

    def _check_counts(self, references: Sequence[MediaReference]) -> None:
        images = sum(reference.kind != "video" for reference in references)
        videos = sum(reference.kind != "image" for reference in references)
        for count, limit, name in (
            (images, self._config.max_images, "images"),
            (videos, self._config.max_videos, "videos"),
        ):
            if count > limit:
                text = f"the request has {count:,} {name}, and the limit is {limit}; send fewer"
                raise RequestError(400, text, "too_many_media", "messages")

    def _max_tokens(self, chat: ChatRequest) -> int:
        limit = self._config.max_tokens
        asked = chat.max_completion_tokens or chat.max_tokens or limit
        if asked > limit:
            param = "max_completion_tokens" if chat.max_completion_tokens else "max_tokens"
            raise RequestError(400, f"{param} is {asked:,}, and the limit is {limit:,}", "too_many_tokens", param)
        return asked

    async def _next_event(self, answer: AnswerRequest) -> AnswerEvent:
        """Return the next event of an answer.

        Raises:
            RequestError: the answer failed, or took too long.
        """
        seconds = self._config.request_seconds
        left = answer.started + seconds - time.monotonic()
        try:
            event = await asyncio.wait_for(answer.events.get(), left)
        except asyncio.TimeoutError:
            text = f"the answer took longer than {seconds:g} seconds; ask for fewer tokens, or try again later"
            raise RequestError(503, text, "timeout", retry_after=10) from None
        if isinstance(event, RequestError):
            raise event
        return event

    async def _events(self, event: AnswerEvent, answer: AnswerRequest) -> AsyncIterator[AnswerEvent]:
        """Yield the events of an answer whose first one is known."""
        yield event
        while not event.finish_reason:
            event = await self._next_event(answer)
            yield event

    async def _collect(self, first: AnswerEvent, answer: AnswerRequest) -> list[AnswerEvent]:
        return [event async for event in self._events(first, answer)]

    # files ------------------------------------------------------------------------------------------------------------

    async def _upload(self, request: Request) -> Response:
        if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise RequestError(415, "send the file as multipart/form-data", "wrong_content_type")
        with self._transfer():
            try:
                async with request.form(max_files=1, max_fields=8, max_part_size=FORM_BYTES) as form:
                    stored = await self._store_upload(form)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
        return JSONResponse(stored.to_dict())

    async def _store_upload(self, form: FormData) -> UploadedFile:
        unknown = [name for name in form if name not in ("file", "purpose")]
        file, purpose = form.get("file"), form.get("purpose", "user_data")
        if unknown:
            text = f"{unknown[0][:100]!r} is not supported; leave it out"
            raise RequestError(400, text, "unknown_field", unknown[0][:100])
        if not isinstance(file, UploadFile) or not isinstance(purpose, str):
            raise RequestError(400, "the form has no file; add a part named file", "missing_file", "file")
        return await run_in_threadpool(self._receive_upload, file, purpose)

    def _receive_upload(self, file: UploadFile, purpose: str) -> UploadedFile:
        """Copy an upload to the disk, and refuse a file that no request could use."""
        copy = self._store.copy(file.file, "file")
        try:
            self._engine.reader.check(copy, "file")
        except BaseException:
            self._store.release(copy)
            raise
        return self._store.add(copy, file.filename or "", purpose)

    async def _list_uploads(self, request: Request) -> Response:
        found = [file.to_dict() for file in self._store.files()]
        return JSONResponse({"object": "list", "data": found, "has_more": False})

    async def _describe_upload(self, request: Request) -> Response:
        return JSONResponse(self._store.get(request.path_params["id"]).to_dict())

    async def _remove_upload(self, request: Request) -> Response:
        number = request.path_params["id"]
        self._store.remove(number)
        return JSONResponse({"id": number, "object": "file", "deleted": True})

    async def _frames(self, request: Request) -> Response:
        start, end = (_second(request.query_params, name) for name in ("start", "end"))
        if start is not None and end is not None and end <= start:
            raise RequestError(400, f"end {end:g} is not after start {start:g}", "invalid_value", "end")
        with self._transfer():
            media = RequestMedia(self._store.link(request.path_params["id"]), "", "file", start, end)
            try:
                shown = await run_in_threadpool(self._engine.reader.show, media, self._manifest, False)
                strip = await run_in_threadpool(_strip, shown)
            finally:
                self._store.release(media.file)
        return JSONResponse({"object": "list", "kind": shown.view.kind, "data": strip})

    @contextmanager
    def _transfer(self) -> Iterator[None]:
        """Refuse more than a few uploads, and strips of frames, at the same time."""
        if self._transfers >= TRANSFERS:
            text = f"{TRANSFERS} files are received or decoded already; try again later"
            raise RequestError(429, text, "too_many_transfers", retry_after=1)
        self._transfers += 1
        try:
            yield
        finally:
            self._transfers -= 1


@dataclass(frozen=True, slots=True)
class _Chat:
    """A request for a completion that was read."""

    answer: AnswerRequest
    form: CompletionFormat
    stream: bool


def _sampling(chat: ChatRequest) -> Sampling:
    """Return how tokens are chosen: greedy unless a temperature is given, and at random unless a seed is."""
    seed = secrets.randbits(32) if chat.seed is None else chat.seed
    return Sampling(chat.temperature or 0.0, 1.0 if chat.top_p is None else chat.top_p, seed)


def _second(query: Mapping[str, str], name: str) -> float | None:
    """Read a second of a video from the query."""
    text = query.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= MAX_SECOND:
        raise RequestError(400, f"{name}: must be a number of seconds, not {text[:20]!r}", "invalid_value", name)
    return value


def _strip(shown: ShownMedia) -> list[dict[str, Any]]:
    """Return small images of the frames that the model sees, or of an image's overview tile."""
    pixels = shown.pixels if shown.view.kind == "image" else shown.pixels.reshape(-1, *shown.pixels.shape[2:])
    times: Sequence[float | None] = shown.times or [None]
    return [
        {"second": None if second is None else round(second, 3), "image": _thumbnail(frame)}
        for second, frame in zip(times, pixels, strict=False)
    ]


def _thumbnail(frame: np.ndarray) -> str:
    """Return a small JPEG of a frame, uint8 (S, S, 3), as a data: URL."""
    image = Image.fromarray(frame)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


async def _static(name: str, request: Request) -> Response:
    return FileResponse(PAGE / name)


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error_response(error)


async def _refuse_http(request: Request, error: Exception) -> Response:
    """Answer what Starlette refuses itself: an unknown path, a wrong method, a malformed form."""
    assert isinstance(error, HTTPException)
    text = {404: "there is no such path", 405: "this path has no such method"}.get(error.status_code, error.detail)
    return error_response(RequestError(error.status_code, text, f"http_{error.status_code}"))


async def _refuse_unexpected(request: Request, error: Exception) -> Response:
    return error_response(RequestError(500, f"the server failed ({type(error).__name__})", "internal_error"))
