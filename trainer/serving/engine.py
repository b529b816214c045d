"""The engine: waiting requests become prompts, prompts become answers that grow together.

    submit -> waiting -> preparing threads -> prompts -> model thread -> events of each request

Preparing threads decode media. One thread runs the model, so requests never block the server's event loop. At most
:data:`READY` prompts with pixels wait for the model, however many requests there are.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.inference.byte_cache import ByteCache
from framestream.trainer.inference.generation import Sampling
from framestream.trainer.inference.predictor import Predictor
from framestream.trainer.serving.answer_text import AnswerText
from framestream.trainer.serving.config import ServingConfig
from framestream.trainer.serving.decoding import DecodingBatch, GrowingAnswer
from framestream.trainer.serving.errors import RequestError
from framestream.trainer.serving.media import RequestMedia, UploadReader
from framestream.trainer.serving.metrics import ServingMetrics
from framestream.trainer.serving.prompts import KeptMedia, PromptPreparer, PromptRunner, ServingPrompt

READY = 2  #: prompts that wait for the model
MAX_RETRY_AFTER = 60  #: seconds
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AnswerEvent:
    """A piece of an answer, or its end."""

    text: str = ""
    finish_reason: str = ""  #: ``stop`` or ``length`` at the end
    prompt_tokens: int = 0  #: at the end
    answer_tokens: int = 0  #: at the end


@dataclass(eq=False)
class AnswerRequest:
    """One request of the engine. The event loop that makes it reads its events."""

    turns: Sequence[dict[str, str]]
    media: Sequence[RequestMedia]
    sampling: Sampling
    max_tokens: int
    stops: Sequence[str] = ()
    frames: int | None = None  #: the most frames of a video
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    events: asyncio.Queue[AnswerEvent | RequestError] = field(default_factory=asyncio.Queue)
    started: float = field(default_factory=time.monotonic)
    cancelled: bool = False  #: nobody waits for it any more
    prompt: ServingPrompt | None = None  #: from preparing to running it
    prompt_tokens: int = 0
    text: AnswerText | None = None  #: while it grows
    answer: GrowingAnswer | None = None

    def send(self, event: AnswerEvent | RequestError) -> None:
        """Hand an event to the event loop."""
        try:
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)
        except RuntimeError:  # the loop has ended
            self.cancelled = True


class ServingEngine:
    """Answers requests with one model.

    Args:
        predictor: the model, its tokenizer and its device.
        manifest: how media and texts are shown to it.
        metrics: receive numbers of tokens and seconds.
    """

    def __init__(
        self, predictor: Predictor, manifest: Manifest, config: ServingConfig, metrics: ServingMetrics
    ) -> None:
        self._predictor, self._config, self._metrics = predictor, config, metrics
        self._limit = manifest.model.language_model.max_position_embeddings
        self._ends = set(predictor.chat_template.end_ids)
        self.reader = UploadReader(config)
        self.cache: ByteCache[KeptMedia] = ByteCache(config.cache_bytes)
        self._preparer = PromptPreparer(manifest, predictor.chat_template, self.reader, self.cache, config)
        self._runner = PromptRunner(predictor.model, predictor.device, manifest, self.cache)
        self._batch = DecodingBatch(predictor.model)
        self._running: list[AnswerRequest] = []
        self._waiting: deque[AnswerRequest] = deque()
        self._ready: deque[AnswerRequest] = deque()
        self._preparing = 0
        self._seconds = 1.0  # of an answer, on average
        self._closed = False
        self._changed = threading.Condition()
        self._model_thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._threads = [threading.Thread(target=self._prepare, daemon=True) for _ in range(config.decode_processes)]

    def start(self) -> None:
        """Start the threads."""
        for thread in (self._model_thread, *self._threads):
            thread.start()

    def close(self) -> None:
        """End the threads. Requests that are not answered get an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.reader.close()
        for thread in (self._model_thread, *self._threads):
            thread.join(10)
        for request in (*self._running, *self._ready, *self._waiting):
            request.send(_closing())

    @property
    def alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._model_thread.is_alive()

    @property
    def num_waiting(self) -> int:
        """Requests that do not grow yet."""
        return len(self._waiting) + self._preparing + len(self._ready)

    @property
    def num_running(self) -> int:
        """Answers that grow."""
        return len(self._running)

    def check_room(self) -> None:
        """Raise RequestError if no request can wait now."""
        if self._closed or not self.alive:
            raise _closing()
        if self.num_waiting >= self._config.max_queue:
            text = f"{self._config.max_queue} requests wait already; try again later"
            raise RequestError(429, text, "queue_full", retry_after=self._retry_after())

    def submit(self, request: AnswerRequest) -> None:
        """Let a request wait for its answer, whose events it then receives.

        Raises:
            RequestError: too many wait already.
        """
        with self._changed:
            self.check_room()
            self._waiting.append(request)
            self._changed.notify_all()

    def cancel(self, request: AnswerRequest) -> None:
        """End a request that nobody waits for any more."""
        request.cancelled = True
        with self._changed:
            for requests in (self._waiting, self._ready):
                if request in requests:
                    requests.remove(request)
            self._changed.notify_all()

    def _retry_after(self) -> int:
        seconds = self._seconds * self.num_waiting / self._config.max_batch
        return min(max(math.ceil(seconds), 1), MAX_RETRY_AFTER)

    # preparing threads ------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make prompts of waiting requests, one after the other."""
        while (request := self._next_waiting()) is not None:
            try:
                if not request.cancelled:
                    request.prompt = self._preparer.prepare(request.turns, request.media, request.frames)
                    request.prompt_tokens = request.prompt.tokens
            except RequestError as error:
                request.send(error)
            except Exception as error:
                if not request.cancelled:  # its files are gone then
                    request.send(_unexpected(error))
            with self._changed:
                self._preparing -= 1
                if request.prompt is not None and not request.cancelled:
                    self._ready.append(request)
                self._changed.notify_all()

    def _next_waiting(self) -> AnswerRequest | None:
        """Wait for a request, and for room among the prompts; returns None at the end."""
        with self._changed:
            while not self._closed:
                if self._waiting and self._preparing + len(self._ready) < READY + self._config.decode_processes:
                    self._preparing += 1
                    return self._waiting.popleft()
                self._changed.wait()
        return None

    # model thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Begin and grow answers until the end."""
        if (device := self._predictor.device).type != "cpu":
            torch.get_device_module(device.type).set_device(device)  # each thread has its own
        while True:
            with self._changed:
                while not (self._closed or self._running or self._ready):
                    self._changed.wait()
                if self._closed:
                    return
                request = self._next_ready()
            if request is not None:
                self._begin(request)
            if self._running:
                self._grow()

    def _next_ready(self) -> AnswerRequest | None:
        """Return the next prompt if its answer has room among the others. Called with the lock held."""
        while self._ready and self._ready[0].cancelled:
            self._ready.popleft()
            self._changed.notify_all()
        if not self._ready or len(self._running) >= self._config.max_batch:
            return None
        head = self._ready[0]
        others = [self._longest(request) for request in self._running]
        width = max([self._longest(head), *others])
        if others and width * (len(others) + 1) > self._config.max_batch_tokens:
            return None
        self._ready.popleft()
        self._changed.notify_all()
        return head

    def _longest(self, request: AnswerRequest) -> int:
        return min(request.prompt_tokens + request.max_tokens, self._limit)

    def _begin(self, request: AnswerRequest) -> None:
        prompt, request.prompt = request.prompt, None  # its visual tokens are free once it was run
        assert prompt is not None
        try:
            request.answer = self._batch.add(self._runner.run(prompt), request.sampling)
        except Exception as error:
            request.send(_unexpected(error))
            return
        request.text = AnswerText(self._predictor.decode, request.stops)
        self._running.append(request)
        self._metrics.prompt_tokens.inc(request.prompt_tokens)

    def _grow(self) -> None:
        """Add a token to every answer, and end those that are complete."""
        try:
            self._batch.choose()
            ended = [request for request in self._running if self._is_over(request)]
            self._end(ended)
            if self._running:
                self._batch.extend()
        except Exception as error:
            failure = _unexpected(error)
            for request in self._running:
                request.send(failure)
            self._end(self._running)

    def _is_over(self, request: AnswerRequest) -> bool:
        """Pass the last token of an answer on; returns whether the answer is complete, or nobody waits for it."""
        assert request.answer is not None and request.text is not None
        if request.cancelled:
            return True
        tokens, now = request.answer.tokens, time.monotonic()
        if len(tokens) == 1:
            self._metrics.first_token.observe(now - request.started)
        if tokens[-1] in self._ends:
            tokens.pop()
            reason = "stop"
        else:
            if piece := request.text.push(tokens[-1]):
                request.send(AnswerEvent(piece))
            full = len(tokens) >= request.max_tokens or request.prompt_tokens + len(tokens) >= self._limit
            reason = "stop" if request.text.stopped else "length" if full else ""
        if not reason:
            return False
        if not request.text.stopped and (rest := request.text.finish()):
            request.send(AnswerEvent(rest))
            reason = "stop" if request.text.stopped else reason
        request.send(AnswerEvent("", reason, request.prompt_tokens, len(tokens)))
        self._metrics.answer_tokens.inc(len(tokens))
        self._metrics.answer_seconds.observe(now - request.started)
        self._seconds += 0.1 * (now - request.started - self._seconds)
        return True

    def _end(self, ended: Sequence[AnswerRequest]) -> None:
        self._batch.remove([request.answer for request in ended if request.answer is not None])
        self._running = [request for request in self._running if request not in ended]


def _closing() -> RequestError:
    return RequestError(503, "the server is shutting down; ask another one", "shutting_down", retry_after=10)


def _unexpected(error: Exception) -> RequestError:
    """Return the error of a request that failed for a reason of the server, and log it."""
    _log.error("a request failed", exc_info=error)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return RequestError(503, "the server has not enough memory now; try later", "out_of_memory", retry_after=10)
    return RequestError(500, f"the server failed ({type(error).__name__})", "internal_error")
