"""TODO."""

from __future__ import annotations

import math
import posixpath
from dataclasses import dataclass
from typing import Any

from framestream.pipeline.annotations.surrogates import REPLACEMENT
from framestream.pipeline.config.data import READERS, EntryConfig

IMAGE_PLACEHOLDER = "<image>"  #: stands where a media item belongs, an image or a video

VIDEO_PLACEHOLDER = "<video>"

ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt", "system": "system"}


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


def normalize(
    sample: Any, entry: EntryConfig, position: int, placeholder: str = "convert", compat: str = "none"
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
    if placeholder == "refuse" and any(VIDEO_PLACEHOLDER in turn["value"] for turn in turns):
        message = f"a turn holds {VIDEO_PLACEHOLDER}, which would stay text; set data.text_placeholder: convert"
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


def _media(meta: dict[str, Any], entry: EntryConfig) -> tuple[MediaRef, ...]:
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


def _check_kind(kind: str, entry: EntryConfig) -> None:
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
        turn["value"] = turn["value"].replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER)
        if number or turn["from"] != "gpt":
            marks += turn["value"].count(IMAGE_PLACEHOLDER)
    if len(media) == 1 and not marks:
        first = next(turn for turn in turns if turn["from"] == "human")
        first["value"] = f"{IMAGE_PLACEHOLDER}\n{first['value']}"
    elif marks != len(media):
        message = f"conversations: {marks} {IMAGE_PLACEHOLDER} or {VIDEO_PLACEHOLDER} marks for {len(media)} media"
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
        text.replace(REPLACEMENT, "\ud800").encode()
    return text


def _id(sample: Any, position: int) -> str:
    value = sample.get("id") if isinstance(sample, dict) else None
    return str(position) if value is None else str(value)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{value!r:.60} ({type(value).__name__})"
