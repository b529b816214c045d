"""Read a long part of a file in order over one HTTP request, which goes on where it broke."""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Iterator
from functools import partial

from framestream.pipeline.storage.connections import Deadline
from framestream.pipeline.storage.http import (
    Address,
    RangeClient,
    ReadRetries,
    TransientReadError,
    connection_error,
    range_total,
)
from framestream.pipeline.utils.retry import call_with_retries

PIECE = 1 << 20  #: bytes that are yielded at once, at most
STEP = 1 << 16  #: bytes that are received between two looks at the clock


class SequentialRead:
    """The bytes ``offset`` to ``offset + size`` of a file of ``total`` bytes, as an iterable of pieces.

    A request that breaks is made again from the byte that is missing, if the file is still the same. ``locate`` returns
    the address for each request, because signed addresses expire. ``timeout`` is the limit for each piece, with its
    ``retries``.

    Raises:
        OSError, ValueError: while iterating; one line that names the file.
    """

    def __init__(
        self,
        client: RangeClient,
        locate: Callable[[], Address],
        span: tuple[int, int],
        total: int,
        timeout: float,
        retries: int,
    ) -> None:
        self._client, self._locate, self._total = client, locate, total
        self._address = locate()
        self._position, self._end = span[0], span[0] + span[1]
        self._timeout, self._retries = timeout, retries
        self._identity: str | None = None  # of the file, once it has answered
        self._open = contextlib.ExitStack()
        self._response: http.client.HTTPResponse | None = None

    def __iter__(self) -> Iterator[bytes]:
        with self._open:
            while self._position < self._end:
                deadline = Deadline(self._timeout)
                policy = ReadRetries(self._address, deadline, self._retries)
                piece = call_with_retries(partial(self._piece, deadline), TransientReadError, policy)
                self._position += len(piece)
                yield piece

    def _piece(self, deadline: Deadline) -> bytes:
        """Return the next piece; a fault closes the request, so that the next try opens another."""
        parts: list[bytes] = []
        try:
            if self._response is None:
                self._response = self._request(deadline)
            wanted = min(PIECE, self._end - self._position)
            while wanted:
                data = self._response.read(min(STEP, wanted))
                if not data:
                    raise TransientReadError(ConnectionError, "the server sent too few bytes")
                parts.append(data)
                wanted -= len(data)
                if wanted and deadline.remaining <= 0:
                    raise TimeoutError
        except (OSError, http.client.HTTPException) as error:
            self._close()
            if deadline.remaining <= 0 or not parts:
                raise connection_error(error, self._address, deadline) from None
        except TransientReadError:
            self._close()
            if not parts:
                raise
        except BaseException:
            self._close()
            raise
        return b"".join(parts)

    def _request(self, deadline: Deadline) -> http.client.HTTPResponse:
        self._address = self._locate()
        response = self._open.enter_context(
            self._client.open_range(self._address, self._position, self._end - self._position, deadline)
        )
        total, identity = range_total(self._address, response, self._position)
        name = self._address.display_url
        if total != self._total:
            raise ValueError(f"{name}: has {total:,} of {self._total:,} bytes; copy the file there again")
        if self._identity not in (None, identity):
            raise ValueError(f"{name}: has changed while it was being read; open it again")
        self._identity = identity
        return response

    def _close(self) -> None:
        self._response = None
        self._open.close()
