"""Annotation files read into dialogues of one shape, whatever shape they were written in.

A file is a ``.json`` list, ``.jsonl`` lines or ``.parquet`` rows (the first two also ``.gz`` or ``.zst``) and is read
as a stream. A sample holds ``conversations`` (``from``/``value`` or ``role``/``content``) and, unless it is text only,
``image`` (a path or a list of paths) or ``video`` (a path, with an optional clip from ``start`` to ``end`` seconds).
What comes out:

* roles are ``human``, ``gpt`` and ``system``
* every media item has one ``<image>`` mark, for videos too; ``<video>`` is converted or refused
* one media item without any mark is put at the start of the first human turn, which is what such files mean
* media paths are relative, and stay below their root
* all other fields are kept as ``meta``

A sample that cannot be used is yielded as an :class:`AnnotationError` with its reason, never dropped silently.
"""

from __future__ import annotations

import io
import json
import math
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.json_text import NO_CHARACTER, PairedEscapes
from pipeline.manifest import READERS, Entry
from pipeline.strategy import select

MARK = "<image>"  #: stands where a media item belongs, an image or a video
VIDEO_MARK = "<video>"
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}
COMPRESSED = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A media item as a sample names it: ``path`` below the place that ``root`` (the entry's) stands for."""

    kind: str  #: video or image
    root: str
    path: str  #: relative, with forward slashes, without . and ..
    reader: str = ""  #: how a video is read (decord, img, frame, gif, av); empty for an image
    start: float | None = None  #: seconds of the source at which the clip begins
    end: float | None = None

    @property
    def source(self) -> str:
        """Root and path, as shown in ledgers and the index."""
        return f"{self.root.rstrip('/')}/{self.path}" if self.root else self.path


@dataclass(frozen=True, slots=True)
class Annotation:
    """One dialogue; ``turns`` hold ``from`` (human, gpt, system) and ``value``, with one mark for each media item."""

    entry: str
    position: int  #: of the sample in its file, from 0
    id: str
    media: tuple[MediaRef, ...]
    turns: tuple[dict[str, str], ...]
    meta: dict[str, Any]


class AnnotationError(ValueError):
    """A sample that cannot be used: where it is, a ``reason`` for the ledger, and one line that says why."""

    def __init__(self, reason: str, message: str, entry: str = "", position: int = -1, id: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.entry = entry
        self.position = position
        self.id = id


class AnnotationFileError(ValueError):
    """An annotation file that cannot be read at all or not to its end: one line with the file and the fix."""


def read_annotations(
    path: str | Path,
    entry: Entry,
    *,
    placeholder: str = "convert",
    seed: int = 0,
    limit: int | None = None,
    compat: str = "none",
) -> Iterator[Annotation | AnnotationError]:
    """The samples of ``entry`` that its sampling strategy takes, in the order of the file ``path``.

    Args:
        path: where the entry's annotation file is on this machine.
        entry: names the root, the reader, the kinds of media and the sampling.
        placeholder: ``convert`` makes ``<video>`` an ``<image>`` mark, ``refuse`` makes it an error of the sample.
        seed: of ``random:N``.
        limit: take only the first so many of the samples that were selected.
        compat: ``published`` makes a first turn that is not ``from`` human or gpt an error of the sample.

    Raises:
        AnnotationFileError: the file cannot be read, is of no known kind, or is broken.
    """
    path = Path(path)
    samples: Iterator[tuple[int, Any]] = enumerate(_samples(path))
    if entry.sampling != "all":
        samples = _picked(samples, select(entry.sampling, count_samples(path), seed))
    for position, sample in islice(samples, limit):
        try:
            if isinstance(sample, AnnotationError):
                raise sample
            yield normalise(sample, entry, position, placeholder, compat)
        except AnnotationError as error:
            error.entry, error.position = entry.name, position
            error.id = _id(sample, position)
            yield error


def count_samples(path: str | Path) -> int:
    """Number of samples in an annotation file (AnnotationFileError as :func:`read_annotations`)."""
    path = Path(path)
    with _explained(path):
        if _kind_of_file(path) == ".parquet":
            return pq.read_metadata(path).num_rows
        if _kind_of_file(path) == ".jsonl":
            with _opened(path) as file:
                return sum(1 for line in file if line.strip())
    return sum(1 for _ in _samples(path))


# Files ----------------------------------------------------------------------------------------------------------------


def _kind_of_file(path: Path) -> str:
    """The suffix that says what is in a file, compressed or not."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _opened(path: Path) -> io.BufferedReader:
    return io.BufferedReader(pa.input_stream(str(path), compression="detect"), 1 << 20)


def _samples(path: Path) -> Iterator[Any]:
    """Every sample as a plain value; a line of JSON lines that is no JSON comes as an AnnotationError."""
    kind = _kind_of_file(path)
    with _explained(path):
        if kind == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                yield from batch.to_pylist()
        elif kind in (".json", ".jsonl"):
            with _opened(path) as file:
                yield from _json_list(path, file) if kind == ".json" else _json_lines(file)
        else:
            raise AnnotationFileError(f"{path}: unknown kind of annotation file; give .json, .jsonl or .parquet")


def _json_list(path: Path, file: io.BufferedReader) -> Iterator[Any]:
    head = b""
    while not head and (line := file.readline(1 << 16)):
        head = line.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head:
        return
    if not head.startswith(b"["):
        raise AnnotationFileError(f"{path}: expected a JSON list of samples; name a file of JSON lines .jsonl")
    yield from ijson.items(PairedEscapes(head, file), "item", use_float=True)


def _json_lines(file: io.BufferedReader) -> Iterator[Any]:
    for line in file:
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            yield AnnotationError("bad_sample", f"the line is not JSON ({_one_line(error)})")


class _explained:
    """Turns what readers raise on a broken file into one line."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise AnnotationFileError(f"{self._path}: no such annotation file; correct its path or fetch it")
        if isinstance(error, (ijson.JSONError, pa.ArrowException, OSError, UnicodeDecodeError, RecursionError)):
            raise AnnotationFileError(f"{self._path}: cannot be read to its end ({_one_line(error)}); fetch it again")


def _picked(samples: Iterator[tuple[int, Any]], positions: range | np.ndarray) -> Iterator[tuple[int, Any]]:
    wanted = iter(positions)
    target = next(wanted, None)
    for position, sample in samples:
        if target is None:
            return
        if position == target:
            yield position, sample
            target = next(wanted, None)


# Samples --------------------------------------------------------------------------------------------------------------


def normalise(
    sample: Any, entry: Entry, position: int, placeholder: str = "convert", compat: str = "none"
) -> Annotation:
    """One sample as an :class:`Annotation`.

    Raises:
        AnnotationError: its ``reason`` is bad_sample, no_conversations, bad_turn, no_answer, bad_media, wrong_media,
            bad_clip, outside_root, placeholder_refused or placeholder_mismatch.
    """
    if not isinstance(sample, dict):
        raise AnnotationError("bad_sample", f"a sample must be a mapping of fields, found {_kind(sample)}")
    meta = dict(sample)
    conversations = meta.pop("conversations", None)
    turns = _turns(conversations)
    if compat == "published" and conversations[0].get("from") not in ("human", "gpt"):
        message = "conversations[0]: with compat: published the first turn is `from` human or gpt, by these names"
        raise AnnotationError("bad_turn", message)
    media = _media(meta, entry)
    meta.pop("id", None)
    if placeholder == "refuse" and any(VIDEO_MARK in turn["value"] for turn in turns):
        message = f"a turn holds {VIDEO_MARK}, which would stay text; set data.text_placeholder: convert"
        raise AnnotationError("placeholder_refused", message)
    turns = _marked(turns, media)
    try:
        for text in (*(turn["value"] for turn in turns), *(item.path for item in media)):
            _whole(text)
        return Annotation(entry.name, position, _whole(_id(sample, position)), media, turns, _clean(meta))
    except UnicodeEncodeError:
        raise AnnotationError("bad_sample", "the text holds half a UTF-16 pair, which is no character") from None


def _turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, (list, tuple)) or not value:
        found = "nothing" if value is None or value == [] else _kind(value)
        raise AnnotationError("no_conversations", f"conversations: expected a list of turns, found {found}")
    turns, kinds = [], []
    for number, turn in enumerate(value):
        if not isinstance(turn, dict):
            message = f"conversations[{number}]: expected a mapping with from and value, found {_kind(turn)}"
            raise AnnotationError("bad_turn", message)
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        kind = ROLES.get(role) or ROLES.get(role.lower()) if isinstance(role, str) else None
        if kind is None:
            message = f"conversations[{number}]: from is {role!r:.40}; expected one of {', '.join(ROLES)}"
            raise AnnotationError("bad_turn", message)
        if not isinstance(text, str):
            raise AnnotationError("bad_turn", f"conversations[{number}]: value: expected text, found {_kind(text)}")
        turns.append({"from": kind, "value": text})
        kinds.append(kind)
    if "human" not in kinds or "gpt" not in kinds[kinds.index("human") :]:
        raise AnnotationError("no_answer", "conversations: no human turn is followed by an answer; nothing to learn")
    return turns


def _media(meta: dict[str, Any], entry: Entry) -> tuple[MediaRef, ...]:
    """The media of a sample; their fields are taken out of ``meta``. ``image`` wins where both are given."""
    for name in ("images", "videos"):
        if meta.get(name) and not (meta.get("image") or meta.get("video")):
            raise AnnotationError("bad_media", f"{name}: is not read; name the media in `{name[:-1]}`")
    image, video = (meta.pop(name, None) for name in ("image", "video"))
    if image not in (None, "", []):
        _check_kind("image", entry)
        paths = image if isinstance(image, list) else [image]
        return tuple(MediaRef("image", entry.root, _path("image", path)) for path in paths)
    if video in (None, "", []):
        return ()
    _check_kind("video", entry)
    if isinstance(video, list) and len(video) == 1:
        video = video[0]
    reader = meta.pop("video_read_type", None) or entry.reader
    if reader not in READERS:
        raise AnnotationError("bad_media", f"video_read_type: {reader!r:.40} is not one of {', '.join(READERS)}")
    start, end = (_seconds(name, meta.pop(name, None)) for name in ("start", "end"))
    if (start is not None and start < 0) or (end is not None and end <= (start or 0)):
        raise AnnotationError("bad_clip", f"start, end: {start} to {end} seconds is no clip")
    return (MediaRef("video", entry.root, _path("video", video), reader, start, end),)


def _check_kind(kind: str, entry: Entry) -> None:
    if entry.media_type not in ("auto", "mix", kind):
        raise AnnotationError("wrong_media", f"{kind}: the entry's media_type is {entry.media_type}; use mix")


def _path(name: str, path: Any) -> str:
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise AnnotationError("bad_media", f"{name}: expected a path, found {_kind(path)}")
    clean = posixpath.normpath(path)
    if clean.startswith("/") or clean == ".." or clean.startswith("../"):
        raise AnnotationError("outside_root", f"{name}: {path!r:.200} leaves its root; paths are relative to the root")
    return clean


def _seconds(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise AnnotationError("bad_clip", f"{name}: expected a number of seconds, found {value!r:.40}")
    return seconds


def _marked(turns: list[dict[str, str]], media: tuple[MediaRef, ...]) -> tuple[dict[str, str], ...]:
    """The turns with one mark for each media item, changed in place. A gpt turn that opens a dialogue is never used,
    so its marks are not counted."""
    marks = 0
    for number, turn in enumerate(turns):
        turn["value"] = turn["value"].replace(VIDEO_MARK, MARK)
        if number or turn["from"] != "gpt":
            marks += turn["value"].count(MARK)
    if len(media) == 1 and not marks:
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{MARK}\n{first['value']}"
    elif marks != len(media):
        message = f"conversations: {marks} {MARK} or {VIDEO_MARK} marks for {len(media)} media"
        raise AnnotationError("placeholder_mismatch", message)
    return tuple(turns)


def _clean(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinities (missing numbers in tables) become null, the unknown text.

    Raises:
        UnicodeEncodeError: as :func:`_whole`.
    """
    if isinstance(value, str):
        return _whole(value)
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, dict):
        return {_whole(str(name)): _clean(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _whole(str(value))


def _whole(text: str) -> str:
    """``text``; UnicodeEncodeError if it holds half a UTF-16 pair."""
    if not text.isascii():
        text.replace(NO_CHARACTER, "\ud800").encode()
    return text


def _id(sample: Any, position: int) -> str:
    value = sample.get("id") if isinstance(sample, dict) else None
    return str(position) if value is None else str(value)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60} ({type(value).__name__})"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
