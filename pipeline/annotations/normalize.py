"""Convert a sample of an annotation file into an :class:`Annotation`, whichever of the accepted forms it has."""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass
from typing import Any

from framestream.pipeline.config.data import READERS, EntryConfig

IMAGE_PLACEHOLDER = "<image>"  #: marks the position of a media item in the text, an image or a video

VIDEO_PLACEHOLDER = "<video>"

#: role names that are accepted, and the name under which each is stored
ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}

MAX_MEDIA = 4096  #: media items of a sample
MAX_PATH = 4096  #: characters of a path

_EMPTY: tuple[Any, ...] = (None, "", [])  #: values of a media field that name no media


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A media item as a sample names it: ``path`` below the location that ``root`` (the entry's) stands for."""

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
    """One dialogue; ``turns`` have ``from`` (human, gpt, system) and ``value``, with one placeholder per media item."""

    entry: str
    position: int  #: of the sample in its file, from 0
    id: str
    media: tuple[MediaRef, ...]
    turns: tuple[dict[str, str], ...]
    meta: dict[str, Any]


class AnnotationError(ValueError):
    """A sample that cannot be used: its position, a ``reason`` for the ledger, and one line that says why."""

    def __init__(self, reason: str, message: str, entry: str = "", position: int = -1, id: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.entry = entry
        self.position = position
        self.id = id


def normalize(
    sample: Any, entry: EntryConfig, position: int, placeholder: str = "convert", compat: str = "none"
) -> Annotation:
    """Convert one sample to an :class:`Annotation`.

    Raises:
        AnnotationError: its ``reason`` is bad_sample, no_conversations, bad_turn, no_answer, bad_media, wrong_media,
            bad_clip, outside_root, placeholder_refused or placeholder_mismatch.
    """
    if not isinstance(sample, dict):
        raise AnnotationError("bad_sample", f"a sample must be a mapping of fields, found {_describe(sample)}")
    meta = dict(sample)
    conversations = meta.pop("conversations", None)
    turns = _parse_turns(conversations)
    if compat == "published" and conversations[0].get("from") not in ("human", "gpt"):
        message = "conversations[0]: with compat: published, the first turn must have `from` human or gpt"
        raise AnnotationError("bad_turn", message)
    media = _pop_media(meta, entry)
    meta.pop("id", None)
    if placeholder == "refuse" and any(VIDEO_PLACEHOLDER in turn["value"] for turn in turns):
        message = f"a turn contains {VIDEO_PLACEHOLDER}, which would stay text; set data.text_placeholder: convert"
        raise AnnotationError("placeholder_refused", message)
    _place_placeholders(turns, media)
    try:
        for text in (*(turn["value"] for turn in turns), *(item.path for item in media)):
            _check_unicode(text)
        name = _check_unicode(sample_id(sample, position))
        return Annotation(entry.name, position, name, media, tuple(turns), _to_json(meta))
    except UnicodeEncodeError:
        message = "the text contains half of a UTF-16 surrogate pair, or bytes that are not UTF-8"
        raise AnnotationError("bad_sample", message) from None


def _parse_turns(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, (list, tuple)) or not value:
        found = "nothing" if value is None or value == [] else _describe(value)
        raise AnnotationError("no_conversations", f"conversations: expected a list of turns, found {found}")
    turns = [_parse_turn(turn, number) for number, turn in enumerate(value)]
    roles = [turn["from"] for turn in turns]
    if "human" not in roles or "gpt" not in roles[roles.index("human") :]:
        raise AnnotationError("no_answer", "conversations: no human turn is followed by an answer; nothing to learn")
    return turns


def _parse_turn(turn: Any, number: int) -> dict[str, str]:
    if not isinstance(turn, dict):
        message = f"conversations[{number}]: expected a mapping with from and value, found {_describe(turn)}"
        raise AnnotationError("bad_turn", message)
    # rows of a table have all keys, and null in those that they do not use
    name, text = (
        turn.get(other) if turn.get(key) is None else turn[key]
        for key, other in (("from", "role"), ("value", "content"))
    )
    role = ROLES.get(name) or ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        message = f"conversations[{number}]: from is {name!r:.40}; expected one of {', '.join(ROLES)}"
        raise AnnotationError("bad_turn", message)
    if not isinstance(text, str):
        raise AnnotationError("bad_turn", f"conversations[{number}]: value: expected text, found {_describe(text)}")
    return {"from": role, "value": text}


def _pop_media(meta: dict[str, Any], entry: EntryConfig) -> tuple[MediaRef, ...]:
    """Return the media of a sample and remove their fields from ``meta``; ``image`` wins if both are given."""
    for name in ("images", "videos"):
        if meta.get(name) and not (meta.get("image") or meta.get("video")):
            raise AnnotationError("bad_media", f"{name}: is not read; name the media in `{name[:-1]}`")
    image, video = (meta.pop(name, None) for name in ("image", "video"))
    if image not in _EMPTY:
        _check_kind("image", entry)
        paths = image if isinstance(image, list) else [image]
        if len(paths) > MAX_MEDIA:
            raise AnnotationError("bad_media", f"image: names {len(paths)} images, over {MAX_MEDIA}; split the sample")
        return tuple(MediaRef("image", entry.root, _relative_path("image", path)) for path in paths)
    if video in _EMPTY:
        return ()
    _check_kind("video", entry)
    if isinstance(video, list) and len(video) == 1:
        video = video[0]
    reader = _pop_reader(meta, entry)
    start, end = _pop_clip(meta)
    return (MediaRef("video", entry.root, _relative_path("video", video), reader, start, end),)


def _check_kind(kind: str, entry: EntryConfig) -> None:
    if entry.media_type not in ("auto", "mix", kind):
        raise AnnotationError("wrong_media", f"{kind}: the entry's media_type is {entry.media_type}; use mix")


def _pop_reader(meta: dict[str, Any], entry: EntryConfig) -> str:
    reader = meta.pop("video_read_type", None) or entry.reader
    if reader not in READERS:
        raise AnnotationError("bad_media", f"video_read_type: {reader!r:.40} is not one of {', '.join(READERS)}")
    return reader


def _pop_clip(meta: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return the start and end of a clip in seconds and remove them from ``meta``."""
    start, end = (_parse_seconds(name, meta.pop(name, None)) for name in ("start", "end"))
    if (start is not None and start < 0) or (end is not None and end <= (start or 0)):
        raise AnnotationError("bad_clip", f"start, end: invalid clip from {start} to {end} seconds")
    return start, end


def _relative_path(name: str, path: Any) -> str:
    if not isinstance(path, str) or not path.strip() or "\0" in path:
        raise AnnotationError("bad_media", f"{name}: expected a path, found {_describe(path)}")
    if len(path) > MAX_PATH:
        raise AnnotationError(
            "bad_media", f"{name}: a path of {len(path)} characters, over {MAX_PATH}: {path[:60]!r}..."
        )
    clean = posixpath.normpath(path)
    if clean.startswith("/") or clean == ".." or clean.startswith("../"):
        raise AnnotationError("outside_root", f"{name}: {path!r:.200} leaves its root; paths are relative to the root")
    return clean


def _parse_seconds(name: str, value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise AnnotationError("bad_clip", f"{name}: expected a number of seconds, found {value!r:.40}")
    return seconds


def _place_placeholders(turns: list[dict[str, str]], media: tuple[MediaRef, ...]) -> None:
    """Change ``turns`` to have one ``<image>`` per media item, or raise AnnotationError.

    A gpt turn that opens a dialogue is never used, so its placeholders are not counted.
    """
    count = 0
    for number, turn in enumerate(turns):
        turn["value"] = turn["value"].replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
        if number or turn["from"] != "gpt":
            count += turn["value"].count(IMAGE_PLACEHOLDER)
    if len(media) == 1 and not count:
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{IMAGE_PLACEHOLDER}\n{first['value']}"
    elif count != len(media):
        message = f"conversations: {count} {IMAGE_PLACEHOLDER} or {VIDEO_PLACEHOLDER} marks for {len(media)} media"
        raise AnnotationError("placeholder_mismatch", message)


def _to_json(value: Any) -> Any:
    """Convert a value to what JSON can represent.

    NaN and infinities (missing numbers in tables) become null. Integers beyond 64 bits and values of unknown types
    become text.

    Raises:
        UnicodeEncodeError: as :func:`_check_unicode`.
    """
    if isinstance(value, str):
        return _check_unicode(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if -(1 << 63) <= value < 1 << 63 else str(value)
    if isinstance(value, dict):
        return {_check_unicode(str(name)): _to_json(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return _check_unicode(str(value))


def _check_unicode(text: str) -> str:
    """Return ``text``; raise UnicodeEncodeError if it contains half of a UTF-16 surrogate pair."""
    if not text.isascii():
        text.encode()
    return text


def sample_id(sample: Any, position: int) -> str:
    """Return the ``id`` of a sample, or its position as text if it has none."""
    value = sample.get("id") if isinstance(sample, dict) else None
    return str(position) if value is None else str(value)


def _describe(value: Any) -> str:
    shown = value[:60] if isinstance(value, (str, list)) else value
    return "nothing" if value is None else f"{shown!r:.60} ({type(value).__name__})"
