"""Samples of JSON lists and JSON lines, one by one: what is wrong with one of them costs only that one.

A sample is read as Python's ``json`` reads it, with NaN and Infinity. Integers beyond 64 bits become text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from framestream.pipeline.annotations.normalize import AnnotationError
from framestream.pipeline.annotations.text_files import AnnotationFileError, text_blocks

MAX_SAMPLE = 16 << 20  #: characters of a sample as JSON text
MAX_DEPTH = 100  #: lists and mappings that may be within one another

_INT64_DIGITS = 18  # decimal digits that always fit into 64 bits
# A string that ends within the block, the quote of one that does not, or a bracket; between samples also a comma
_WITHIN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_BETWEEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{},]', re.DOTALL)
_IN_STRING = re.compile(r'["\\]')
_SPACE = re.compile(r"[ \t\r\n]*")
_LIST_FIELD = re.compile(r'"(?!conversations")([^"\\]{1,100})"\s*:\s*\[\s*\{')
_MAPPING_FIELD = re.compile(r'\{\s*"(?:[^"\\]|\\.){0,1000}"\s*:\s*\{')
_TOO_LONG = f"the sample is longer than {MAX_SAMPLE:,} characters"
_TOO_DEEP = f"values are nested more than {MAX_DEPTH} deep"


def read_json_samples(path: Path) -> Iterator[Any]:
    """Yield every sample as a plain value, and an AnnotationError for one that is not valid JSON.

    Whether the file is a list or lines is judged by its contents.

    Raises:
        AnnotationFileError: it is neither, or a list that is cut.
    """
    blocks = text_blocks(path)
    head = next(blocks, "")
    if not head:
        return iter(())
    following = next(blocks, "")
    named_lines = path.name.lower().removesuffix(".gz").removesuffix(".zst").endswith(".jsonl")
    first, _, rest = head.partition("\n")
    value = parse_sample(first)
    is_complete = isinstance(value, (dict, list))  # the first line alone is JSON
    has_more_lines = is_complete and bool(rest.strip() or following.strip())
    blocks = chain([head, following], blocks)
    if head.startswith("[") and not (named_lines and has_more_lines):
        return parse_list(path, blocks)
    if named_lines or has_more_lines or (isinstance(value, dict) and "conversations" in value):
        return parse_lines(blocks)
    raise AnnotationFileError(f"{path}: {_describe_head(head)}")


def parse_sample(text: str) -> Any:
    """Return the value of a sample's JSON text, or an AnnotationError that says what is wrong with it."""
    if len(text) > MAX_SAMPLE:
        return AnnotationError("bad_sample", _TOO_LONG)
    if not text:
        return AnnotationError("bad_sample", "there is no sample between two commas, or after the last one")
    try:
        value = _DECODER.decode(text)
    except ValueError as error:
        return AnnotationError("bad_sample", f"the sample is not JSON ({' '.join(str(error).split())[:200]})")
    except RecursionError:
        return AnnotationError("bad_sample", _TOO_DEEP)
    return _check_depth(value, text.count("[") + text.count("{"))


def parse_lines(blocks: Iterable[str]) -> Iterator[Any]:
    """Yield the sample of each line that is not blank, or an AnnotationError."""
    pending, is_long = "", False
    for block in blocks:
        *lines, last = block.split("\n")
        for line in lines:
            line, pending = (pending + line).strip(), ""
            if is_long:
                is_long = False
                yield AnnotationError("bad_sample", _TOO_LONG)
            elif line:
                yield parse_sample(line)
        pending += last
        if len(pending) > MAX_SAMPLE:  # the rest of the line is read over
            pending, is_long = "", is_long or not pending.isspace()
    if is_long:
        yield AnnotationError("bad_sample", _TOO_LONG)
    elif last := pending.strip():
        yield parse_sample(last)


def parse_list(path: Path, blocks: Iterable[str]) -> Iterator[Any]:
    """Yield each sample of a JSON list, or an AnnotationError; ``blocks`` begin with the list's bracket.

    Most samples are parsed where they are. The end of one that is damaged, or in several blocks, is found by looking at
    strings, brackets and commas only.

    Raises:
        AnnotationFileError: the list does not end, or something follows it.
    """
    depth, count, in_string, escaped = 0, 0, False, False
    item = ""  # what earlier blocks have of the sample; at most a little more than MAX_SAMPLE
    stream = iter(blocks)
    for block in stream:
        position = begin = 0
        if in_string:
            position, in_string, escaped = _end_string(block, int(escaped))
        while not in_string:
            if depth == 1 and not item and begin == position:
                for value, end in _parse_ahead(block, position):
                    yield value
                    count, position = count + 1, end
                begin = position
            for match in (_BETWEEN if depth <= 1 else _WITHIN).finditer(block, position):
                at, position = match.span()
                token = block[at]
                if token == '"':
                    if position == at + 1:
                        position, in_string, escaped = _end_string(block, position)
                        break
                elif token in "[{":
                    depth += 1
                    if depth == 1:
                        begin = position
                    if depth <= 2:
                        break
                elif token == "," or depth == 1:
                    text = (item + block[begin:at]).strip()
                    if text or token == "," or count:
                        yield parse_sample(text)
                        count += 1
                    if token == "]":
                        _check_end(path, block[position:], stream)
                        return
                    item, begin = "", position
                    break
                else:
                    depth -= 1
                    if depth == 1:
                        break
            else:
                break
        if len(item) <= MAX_SAMPLE:
            item += block[begin:]
    place = "within a sample" if in_string or depth > 1 or item.strip() else "without its `]`"
    message = f"cannot be read to its end: it is cut, it ends {place} after {count} samples; fetch it again"
    raise AnnotationFileError(f"{path}: {message}")


def _parse_ahead(block: str, position: int) -> Iterator[tuple[Any, int]]:
    """Yield samples that are valid JSON and followed by a comma, with the position behind it."""
    while True:
        start = _end_of_space(block, position)
        try:
            value, end = _DECODER.raw_decode(block, start)
        except (ValueError, RecursionError):
            return
        after = _end_of_space(block, end)
        if block[after : after + 1] != ",":
            return
        position = after + 1
        yield _check_depth(value, block.count("[", start, end) + block.count("{", start, end)), position


def _end_of_space(block: str, position: int) -> int:
    match = _SPACE.match(block, position)
    return match.end() if match else position


def _end_string(block: str, position: int) -> tuple[int, bool, bool]:
    """Go to the end of a string that ``position`` is in.

    Return the position behind it, whether it goes on in the next block, and whether the first character there is
    escaped.
    """
    while match := _IN_STRING.search(block, position):
        if match[0] == '"':
            return match.end(), False, False
        position = match.end() + 1
    return len(block), True, position > len(block)


def _check_end(path: Path, rest: str, blocks: Iterator[str]) -> None:
    """Refuse a file with anything but white space after its list."""
    for block in chain([rest], blocks):
        if text := block.strip():
            message = f"the list of samples ends before {text[:40]!r}; write one list, or one sample on each line"
            raise AnnotationFileError(f"{path}: {message}")


def _describe_head(head: str) -> str:
    """Say what JSON text is that begins with ``head`` and is neither a list nor lines, and the fix."""
    if not head.startswith("{"):
        return f"expected a JSON list of samples, or a sample on each line, found {head[:40]!r}"
    wrong = "is one JSON object; expected a list of samples"
    if match := _LIST_FIELD.search(head):
        return f"{wrong}. If they are in its field `{match[1]}`: jq '.[\"{match[1]}\"]' OLD.json > NEW.json"
    if _MAPPING_FIELD.match(head):
        return f"{wrong}. If its values are the samples, write them as a list: jq '[.[]]' OLD.json > NEW.json"
    if '"conversations"' in head:
        return f"{wrong}. If it is a sample, or the first of several: jq -s . OLD.json > NEW.json"
    return f"{wrong}, or a sample on each line"


def _parse_int(text: str) -> int | str:
    """Return an integer, or its text if it does not fit into 64 bits."""
    if len(text) <= _INT64_DIGITS:
        return int(text)
    number = int(text) if len(text) <= 20 else None
    return number if number is not None and -(1 << 63) <= number < 1 << 63 else text


_DECODER = json.JSONDecoder(parse_int=_parse_int)


def _check_depth(value: Any, brackets: int) -> Any:
    """Return ``value``, or an AnnotationError if it is nested too deep; ``brackets`` are those of its text."""
    return AnnotationError("bad_sample", _TOO_DEEP) if brackets > MAX_DEPTH and _is_deep(value) else value


def _is_deep(value: Any) -> bool:
    """Return whether lists and mappings are nested more than MAX_DEPTH deep."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, (dict, list))
            for item in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(item, (dict, list))
        ]
        if not level:
            return False
    return True
