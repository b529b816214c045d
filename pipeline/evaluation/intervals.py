"""Parse the intervals of time that an answer states, and convert them to seconds of the source.

Temporal grounding sets and their models write intervals in many forms. docs/evaluation.md lists them. As in the
evaluation code of TimeChat and VTimeLLM, the ends of a reversed interval are exchanged. A comma is a decimal point
where it cannot separate two times: before a dash, a unit or a word such as "to", and after one.

The seconds of an answer are those that the model was told: a clip begins at 0, and frame k of a video is shown at
k / fps. :class:`VideoClock` converts them to seconds of the source by the stored times of the frames. The two differ
for clips, and for videos whose frame rate varies.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

Interval = tuple[float, float]  #: start and end in seconds

MAX_CHARACTERS = 2000  #: of an answer that are parsed; longer ones are cut
MAX_INTERVALS = 1000  #: of one question
SAME_SECONDS = 1e-3  #: told and stored times that differ by at most this are one clock

_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_GAP = r"(?:-|\s*)"  #: between a number and its unit: "3 s", "3-second"
_SECONDS = r"(?:(?:seconds?|secs?|s)(?![a-z])|秒)"
_MINUTES = r"(?:(?:minutes?|mins?|(?<=\d)m)(?![a-z])|分钟?)"
_HOURS = r"(?:(?:hours?|hrs?|(?<=\d)h)(?![a-z])|小时)"
_JOIN = r"[\s,]*(?:and\s+)?"
_TIME = (
    rf"((?:\d{{1,3}}:)?\d{{1,4}}:\d{{2}}(?:\.\d+)?"
    rf"|{_NUMBER}{_GAP}{_HOURS}(?:{_JOIN}{_NUMBER}\s*{_MINUTES})?(?:{_JOIN}{_NUMBER}\s*{_SECONDS})?"
    rf"|{_NUMBER}{_GAP}{_MINUTES}(?:{_JOIN}{_NUMBER}\s*{_SECONDS})?"
    rf"|{_NUMBER}(?:{_GAP}{_SECONDS})?)"
)
#: no part of a word, a number, a price, a date or a frame number
_BEFORE = r"(?<![a-z0-9.:$€£¥])(?<!\d-)(?<!frame )(?<!frames )"
_AFTER = r"(?![\d:%]|\.\d|-\d)"
_FILLER = r"(?:(?:about|around|approximately|roughly|the|at|seconds?|timestamps?|times?|t\s*=)\s*){0,3}"
_TO = r"(?:\s*(?:-{1,3}>?|={1,2}>|~|[→⇒➔])\s*|\s*\b(?:to|until|till|through)\b\s*|\s*[至到]\s*)"
_MARK = r"(?:\s+marks?)?"  #: as in "the 3-second mark"
_OPEN, _SHUT = r"[\[(]?", r"[\])]?"  #: brackets around one time
#: the forms of one interval, each with two groups; at one position the first that fits counts
_FORMS = {
    "words": rf"(?:start|begin)[a-z]*[^0-9.]{{0,60}}?{_BEFORE}{_TIME}[^0-9]{{0,80}}?"
    rf"(?:end|finish|stop)[a-z]*[^0-9.]{{0,60}}?{_BEFORE}{_TIME}{_AFTER}",
    "between": rf"\bbetween\s+{_FILLER}{_OPEN}{_TIME}{_SHUT}{_MARK}\s*and\s+{_FILLER}{_OPEN}{_TIME}{_AFTER}",
    "tokens": rf"<\s*{_TIME}\s*>(?:{_TO}|[\s,]*)<\s*{_TIME}\s*>",
    "list": rf"\[\s*{_TIME}\s*[,;\s]\s*{_TIME}\s*\]",
    "pair": rf"\(\s*{_TIME}\s*[,;]\s*{_TIME}\s*\)",
    "range": rf"{_BEFORE}{_TIME}{_SHUT}{_MARK}{_TO}{_FILLER}{_OPEN}{_TIME}{_AFTER}",
}
_ALWAYS_TIME = ("words", "tokens", "list")  #: forms whose numbers are times without a unit
_INTERVAL = re.compile("|".join(f"(?P<{name}>{form})" for name, form in _FORMS.items()))
_TWO_TIMES = re.compile(rf"\W*{_TIME}(?:\s*[,;]\s*|\s+){_TIME}\W*")  #: a complete answer without any word between
#: two events, which a reply may name in place of an interval: "enters at 3 s and leaves at 10 s"
_TWO_EVENTS = re.compile(rf"\bat\s+{_FILLER}{_TIME}[^0-9]{{0,80}}?\bat\s+{_FILLER}{_TIME}{_AFTER}")
_ONLY_BETWEEN = re.compile(r"[\s,;.\[\]]*(?:and\b)?[\s,;.\[\]]*")  #: what may stand between the intervals of a list
#: a unit of time, or a colon; "m" alone may also stand for meters
_HAS_UNIT = re.compile(rf":|{_SECONDS}|(?:minutes?|mins?)(?![a-z])|分|{_HOURS}")
#: what follows a number that is no time
_OTHER_UNIT = (
    r"\s*(?:[%°$€£¥米元度]|(?:meters?|metres?|cm|mm|km|kilomet(?:er|re)s?|centimet(?:er|re)s?|feet|foot|ft|inch|inches"
    r"|miles?|yards?|dollars?|euros?|cents?|pounds?|usd|eur|kg|kilograms?|grams?|lbs?|degrees?|percent|points?|times"
    r"|people|persons?|millions?|billions?|thousands?|lit(?:er|re)s?)(?![a-z]))"
)
_OTHER_UNITS = re.compile(_OTHER_UNIT)
#: what may follow two numbers that have no unit, if they are times
_OTHER_WORDS = re.compile(
    rf"{_OTHER_UNIT}|\s*(?!(?:in the|of|on|at|during|when|while|where|as|because|since|and|or|the|this|that|he|she|it"
    r"|they|is|for|with)(?![a-z]))[a-z]"
)
#: what numbers without a unit are then of
_OTHER_QUANTITY = re.compile(
    r"\b(?:costs?|prices?|priced|pays?|paid|weigh[a-z]*|measur[a-z]*|temperatures?|heights?|widths?|lengths?|speeds?"
    r"|distances?|scores?|ratios?|rates?)(?![a-z])|\dm(?![a-z])"
)
_PART = {name: re.compile(rf"({_NUMBER}){_GAP}{unit}") for name, unit in (("h", _HOURS), ("m", _MINUTES))}
#: a time of one unit, which may belong to two numbers: "1 to 2 minutes"
_ONE_UNIT = re.compile(rf"({_NUMBER}){_GAP}((?:{_HOURS}|{_MINUTES}))")
_ANSWER = re.compile(r"<answer>(.*?)(?:</answer>|$)", re.DOTALL)
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_EMPHASIS = re.compile(r"\*\*+|__+|`+|(?<![a-z0-9])[*_]|[*_](?![a-z0-9])")  #: of Markdown
_CLOCK_COMMA = re.compile(r"(:\d{2}),(\d{1,3})(?![\d:])")  #: of subtitles: "00:00:03,200"
#: a number with a decimal comma, or with commas between thousands
_COMMA = r"(?:\d{1,3}(?:,\d{3})+|\d+,\d{1,2})(?!\d)"
_JOINER = r"(?:[-~→⇒➔]|=>|(?:to|until|till|through)\b|[至到])"
#: commas within a number, not between two: before a unit or a joiner, and after a joiner or a preposition
_COMMAS = (
    re.compile(
        rf"()(?<![\d.,:~-])(?<![-~>→] )(?<!to )(?<!until )(?<!till )(?:(?<![(\[<])(?={_COMMA}{_GAP}{_SECONDS})"
        rf"|(?={_COMMA}{_GAP}(?:{_SECONDS}\s*)?(?:{_JOINER}|and\b)))({_COMMA})"
    ),
    re.compile(
        rf"((?:[-~>→⇒➔至到]|\b(?:to|until|till|through|and|at|from|between)\b)\s*{_FILLER})({_COMMA})"
        rf"(?![.:,]\d|{_GAP}(?:{_SECONDS}\s*)?{_JOINER})"
    ),
)


class IntervalError(ValueError):
    """Invalid ``intervals`` of a question: one line."""


def parse_intervals(text: str) -> list[Interval]:
    """Return the intervals that ``text`` states, in seconds and in its order; empty if it states none."""
    plain = _plain(text)
    found = [one.interval for one in _find(plain)]
    if not found and (only := _TWO_TIMES.fullmatch(plain) or _TWO_EVENTS.search(plain)):
        found = [_interval(only[1], only[2])]
    return found


def stated_intervals(answer: str) -> list[Interval]:
    """Return the intervals of an expected answer that is about time, and of nothing else; else an empty list.

    The intervals must be written as times: with a unit, a decimal point, as ``mm:ss``, in brackets, or as start and
    end. Other words may be around them, but no other number, no other unit, and no words between them. So ``2 - 1``,
    ``3 to 5 people``, ``2.5 - 3.5 meters`` and the events of a dense caption are not about time.
    """
    plain, last = _plain(answer), 0
    found: list[Interval] = []
    for one in _find(plain):
        between = plain[last : one.start]
        if not _is_time(one, plain) or one.interval[0] == one.interval[1] or re.search(r"\d", between):
            return []
        if found and not _ONLY_BETWEEN.fullmatch(between):
            return []
        found.append(one.interval)
        last = one.end
    return [] if re.search(r"\d", plain[last:]) else found


def read_intervals(value: Any) -> list[Interval]:
    """Return the ``intervals`` of an annotation row as pairs of seconds.

    Raises:
        IntervalError: they are not pairs of a start and a later end.
    """
    shown = f"intervals: {str(value)[:60]!r}"
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise IntervalError(f"{shown} must be a list of pairs of seconds, such as [[3.2, 10.5]]")
    if len(value) > MAX_INTERVALS:
        raise IntervalError(f"{shown} are {len(value):,} intervals; at most {MAX_INTERVALS:,} can be compared")
    for pair in value:
        if not all(isinstance(second, (int, float)) and not isinstance(second, bool) for second in pair):
            raise IntervalError(f"{shown} must be a list of pairs of seconds, such as [[3.2, 10.5]]")
        if not 0 <= pair[0] < pair[1] <= sys.float_info.max:
            raise IntervalError(f"{shown}: {str(pair)[:40]} must be a start from 0 and a later end")
    return [(float(start), float(end)) for start, end in value]


class VideoClock(NamedTuple):
    """The seconds in the time message of a video, and the seconds of its source at the same frames."""

    told: list[float]  #: ascending, at least one
    source: list[float]  #: ascending, one for each of ``told``
    start: float  #: second of the source at which the video or clip begins
    end: float  #: second of the source at which it ends

    @classmethod
    def of_frames(cls, told: np.ndarray, source: np.ndarray, start: float, duration: float) -> VideoClock:
        """Make the clock of a video from the times of its frames, float64 (T,) each, in any order and with repeats."""
        told, first = np.unique(told, return_index=True)
        source = np.maximum.accumulate(source[first])
        if np.ptp(source - told) <= SAME_SECONDS:  # one shift for all frames
            told, source = told[:1], source[:1]
        return cls(told.tolist(), source.tolist(), start, start + duration)

    def to_source(self, interval: Interval) -> Interval:
        """Convert an interval from told seconds to seconds of the source.

        It is interpolated between frames. Before the first frame and after the last one, seconds pass equally fast.
        """
        start, end = (self._second(second) for second in interval)
        return start, end

    def crop(self, interval: Interval) -> Interval | None:
        """Return the part of an interval of the source that the video shows; None if it shows nothing of it."""
        start, end = max(interval[0], self.start), min(interval[1], self.end)
        return (start, end) if start < end else None

    def _second(self, second: float) -> float:
        outside = 0 if second <= self.told[0] else -1 if second >= self.told[-1] else None
        if outside is not None:
            return second + self.source[outside] - self.told[outside]
        return float(np.interp(second, self.told, self.source))


class _Found(NamedTuple):
    """An interval of a text."""

    interval: Interval
    form: str  #: one of _FORMS
    times: str  #: both, as they are written
    start: int  #: in the text
    end: int


def _plain(text: str) -> str:
    """Return the answer of a reply in lower case and NFKC, with one kind of dash, decimal points and no Markdown."""
    text = unicodedata.normalize("NFKC", text[: 10 * MAX_CHARACTERS]).lower()
    text = _THINKING.sub(" ", text)
    if answers := _ANSWER.findall(text):
        text = answers[-1]
    text = re.sub(r"[‐-―−]", "-", text)[:MAX_CHARACTERS]
    text = _CLOCK_COMMA.sub(r"\1.\2", _EMPHASIS.sub("", text))
    for commas in _COMMAS:
        text = commas.sub(lambda match: match[1] + _without_comma(match[2]), text)
    return text


def _without_comma(number: str) -> str:
    """Write ``3,2`` as ``3.2``, and ``1,000`` as ``1000``."""
    whole, _, last = number.rpartition(",")
    return f"{whole}.{last}" if len(last) < 3 else number.replace(",", "")


def _find(plain: str) -> Iterator[_Found]:
    """Yield each interval of a text in one of the forms."""
    for match in _INTERVAL.finditer(plain):
        form = str(match.lastgroup)
        first, second = (group for group in match.groups() if group is not None and group != match[form])
        yield _Found(_interval(first, second), form, f"{first} {second}", *match.span())


def _is_time(found: _Found, plain: str) -> bool:
    """Return whether the numbers of an interval are times, and not counts or quantities of another unit."""
    if _HAS_UNIT.search(found.times):
        return True
    if found.form in _ALWAYS_TIME:
        return not _OTHER_UNITS.match(plain, found.end)
    has_point = re.search(r"\.\d", found.times) is not None
    return has_point and not _OTHER_WORDS.match(plain, found.end) and not _OTHER_QUANTITY.search(plain)


def _interval(first: str, second: str) -> Interval:
    """Convert two times to an interval; the later one is its end. ``1`` and ``2 minutes`` are both minutes."""
    both = _ONE_UNIT.fullmatch(second)
    if both and re.fullmatch(_NUMBER, first) and float(first) <= float(both[1]):
        first += both[2]
    start, end = sorted((_to_seconds(first), _to_seconds(second)))
    return start, end


def _to_seconds(text: str) -> float:
    """Convert ``12.5``, ``12.5 s``, ``1:02:03.5`` or ``1 min 5 s`` to seconds."""
    if ":" in text:
        total = 0.0
        for part in text.split(":"):
            total = 60 * total + float(part)
        return total
    total = 0.0
    for name, seconds in (("h", 3600), ("m", 60)):
        if found := _PART[name].match(text.lstrip(" ,")):
            total += seconds * float(found[1])
            text = text.lstrip(" ,")[found.end() :]
    rest = re.search(_NUMBER, text)
    return total + (float(rest[0]) if rest else 0.0)
