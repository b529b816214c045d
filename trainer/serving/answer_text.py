"""The text of a growing answer, piece by piece, up to a text that ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  #: stands for the bytes of an incomplete character


class AnswerText:
    """Decodes the tokens of one answer as they come.

    A character may have several tokens, so a piece comes when all of its tokens have. Each token is decoded with only
    a few before it, so the time for a token does not grow with the answer. Text that may be the beginning of a stop
    text is held back until it is certain.

    Args:
        decode: from ids to text.
        stops: texts that end the answer; they are not part of it.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, [text for text in stops if text]
        self._ids: list[int] = []
        self._start = self._end = 0  # ids between them are decoded again with the new ones, and were yielded
        self._waiting = ""  # decoded, and not yielded, because a stop text may have begun
        self.stopped = False  #: whether a stop text came

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._ids.append(token)
        known = self._decode(self._ids[self._start : self._end])
        text = self._decode(self._ids[self._start :])
        if text.endswith(REPLACEMENT):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """Return the rest of the text."""
        known = self._decode(self._ids[self._start : self._end])
        rest = self._release(self._decode(self._ids[self._start :])[len(known) :])
        if self.stopped:
            return rest
        waiting, self._waiting = self._waiting, ""
        return rest + waiting

    def _release(self, text: str) -> str:
        """Return the part of the waiting text and ``text`` that no stop text can begin in, and find stop texts."""
        if self.stopped:
            return ""
        text = self._waiting + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._waiting = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._waiting = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that is a beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if stop.startswith(text[-length:])), 0)
