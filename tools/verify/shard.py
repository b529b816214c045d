"""One shard against docs/format.md and its rows of the index.

Written from the document, not from the writer, so that a mistake there is found here. A video or picture is parsed
only if its digest is the one stated, so that no decoder sees damaged bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from framestream.pipeline.media.errors import MAX_PIXELS
from framestream.pipeline.media.jpeg import decode_jpeg, jpeg_size
from framestream.pipeline.media.mjpeg_mp4 import frame_ticks, mjpeg_frames
from framestream.tools.verify.findings import Findings
from framestream.tools.verify.tar import PlainTar, TarMember, UnreadableTarError

MEMBERS = {"video": ("mp4", "json"), "image": ("jpg", "json"), "dialogue": ("json",)}
KEYS = {folder: re.compile(f"{folder[0]}[0-9a-f]{{24}}") for folder in MEMBERS}
MAX_JSON = 1 << 26  #: bytes of a json member that is parsed
BATCH = 256  #: index rows that are Python objects at a time

#: Fields of the json member of a media item with their types, of a list that of its items.
MEDIA_FIELDS: Mapping[str, type | list[type]] = {
    **dict.fromkeys(("key", "kind", "source", "sha256", "dialogues"), str),
    **dict.fromkeys(("width", "height", "source_width", "source_height", "vlen"), int),
    **dict.fromkeys(("start", "fps", "duration"), float),
    **{"salvaged": bool, "sample": [int], "frame_index": [int], "timestamps": [float]},
}
DIALOGUE_FIELDS = dict.fromkeys(("key", "id", "entry", "split", "media", "conversations", "meta"), str)


@dataclass(frozen=True, slots=True)
class ShardToCheck:
    """A shard, and what the index says of it."""

    path: Path
    folder: str
    split: str
    samples: int | None = None  #: None where there is no index
    bytes: int = 0
    sha256: str = ""
    first: int = 0  #: row of its first sample in media.arrow or dialogues.arrow

    @property
    def name(self) -> str:
        """Folder and file, for messages."""
        return f"{self.folder}/{self.path.name}"


@dataclass(slots=True)
class ShardResult:
    """What the check of one shard came to."""

    findings: Findings
    samples: int = 0
    frames: int = 0
    bytes: int = 0  #: of the file
    md5: str = ""  #: of the file; empty where something is wrong with it


class FormatError(Exception):
    """Something is wrong with a sample, so that the rest of it is not looked at."""


class ShardCheck:
    """Checks shards against the tables of an index; without them (None) only against themselves.

    Args:
        deep: decode every frame.
        most: findings kept of a shard.
    """

    def __init__(self, media: pa.Table | None, dialogues: pa.Table | None, deep: bool, most: int) -> None:
        self._tables = {"video": media, "image": media, "dialogue": dialogues}
        self._deep, self._most = deep, most
        self._pixels = np.empty((0, 0, 3), dtype=np.uint8)

    def check(self, shard: ShardToCheck) -> ShardResult:
        """Read a shard from front to end."""
        checked = ShardResult(Findings(self._most))
        try:
            with open(shard.path, "rb") as file:
                self._check(shard, file, checked)
        except FileNotFoundError:
            checked.findings.add(shard.name, "is missing")
        except OSError as error:
            checked.findings.add(shard.name, f"cannot be read ({error.strerror})")
        return checked

    def _check(self, shard: ShardToCheck, file: Any, checked: ShardResult) -> None:
        findings = checked.findings
        tar = PlainTar(file, lambda member, what: findings.add(f"{shard.name}: {member}".rstrip(": "), what))
        checked.bytes = tar.size
        known = shard.samples is not None
        if known and tar.size != shard.bytes:
            findings.add(shard.name, f"has {tar.size:,} bytes, the index says {shard.bytes:,}")
        try:
            self._samples(shard, tar, checked)
            if known and checked.samples != shard.samples:
                raise UnreadableTarError(f"it has {checked.samples:,} samples, the index says {shard.samples:,}")
            self._offsets(shard, tar.offsets, findings)
        except UnreadableTarError as error:
            findings.add(shard.name, f"{error}; it was checked up to there")
        try:
            sha256, md5 = tar.digests()
            if known and sha256 != shard.sha256:
                findings.add(shard.name, "its sha256 is not the one in the index")
            checked.md5 = "" if findings.count else md5
        except UnreadableTarError as error:
            findings.add(shard.name, str(error))

    def _samples(self, shard: ShardToCheck, tar: PlainTar, checked: ShardResult) -> None:
        rows, seen = self._rows(shard), set()
        for key, members in tar.samples(MEMBERS[shard.folder]):
            if not KEYS[shard.folder].fullmatch(key):
                raise UnreadableTarError(f"{key} is no key of the folder {shard.folder}")
            if key in seen:
                raise UnreadableTarError(f"the key {key} is there twice")
            seen.add(key)
            row = next(rows, None)
            if shard.samples is not None and (row is None or row["key"] != key):
                there = row["key"] if row else "no more"
                raise UnreadableTarError(f"sample {checked.samples} is {key}, the index says {there}")
            try:
                if shard.folder == "dialogue":
                    self._dialogue(shard, key, members[0], row)
                else:
                    checked.frames += self._media(shard, key, *members, row)
            except FormatError as error:
                checked.findings.add(f"{shard.name}: {error.args[0]}", error.args[1])
            checked.samples += 1

    def _rows(self, shard: ShardToCheck) -> Iterator[dict[str, Any]]:
        end = shard.first + (shard.samples or 0)
        for start in range(shard.first, end, BATCH):
            yield from self._tables[shard.folder].slice(start, min(BATCH, end - start)).to_pylist()

    def _offsets(self, shard: ShardToCheck, offsets: Sequence[int], findings: Findings) -> None:
        """NAME.tar.idx holds these offsets."""
        path, wanted = Path(f"{shard.path}.idx"), np.array(offsets, dtype="<u8").tobytes()
        try:
            with open(path, "rb") as file:
                same = file.read(len(wanted) + 1) == wanted
        except OSError as error:
            findings.add(f"{shard.name}.idx", f"cannot be read ({error.strerror})")
        else:
            if not same:
                findings.add(f"{shard.name}.idx", "does not hold the offsets of the shard's samples")

    # Samples ----------------------------------------------------------------------------------------------------------

    def _media(
        self, shard: ShardToCheck, key: str, data: TarMember, text: TarMember, row: Mapping[str, Any] | None
    ) -> int:
        """Check a video or an image; returns how many frames were checked."""
        facts = _object(text, MEDIA_FIELDS)
        _same(text, facts, {"key": key, "kind": shard.folder}, "should be")
        digest = hashlib.sha256(data.data).hexdigest()
        if row:
            _same(text, facts, {name: row[name] for name in facts.keys() & row.keys()}, "the index says")
            there = {"offset": data.place, "size": len(data.data), "split": shard.split, "sha256": digest}
            _same(data, there, {name: row[name] for name in there}, "the index says")
        if digest != facts["sha256"]:
            raise FormatError(data.name, "its sha256 is not the one in its json")
        _list(text, "dialogues", facts["dialogues"], dict)
        _check_lists(text, facts)
        count, size = len(facts["frame_index"]), (facts["width"], facts["height"])
        if size[0] * size[1] > MAX_PIXELS or min(size) < 1:
            raise FormatError(text.name, f"{size[0]} x {size[1]} pixels is no size that is built")
        starts, lengths = _mp4_frames(data, facts) if shard.folder == "video" else ([0], [len(data.data)])
        if row and (row["frame_offset"], row["frame_size"]) != ([data.place + start for start in starts], lengths):
            raise FormatError(
                data.name, f"frame_offset and frame_size of the index are not where its {count} frames are"
            )
        for number, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            self._frame(data, number, data.data[start : start + length], size, whole=shard.folder == "video")
        return count

    def _frame(self, member: TarMember, number: int, jpeg: bytes, size: tuple[int, int], whole: bool) -> None:
        """A JPEG of this size; ``whole``: nothing follows its end."""
        try:
            if not jpeg.startswith(b"\xff\xd8") or (whole and not jpeg.endswith(b"\xff\xd9")):
                raise ValueError("does not begin and end as a JPEG")
            if jpeg_size(jpeg) != size:
                raise ValueError("is {} x {}, its json says {} x {}".format(*jpeg_size(jpeg), *size))
            if self._deep:
                if self._pixels.shape[1::-1] != size:
                    self._pixels = np.empty((*size[::-1], 3), dtype=np.uint8)
                decode_jpeg(jpeg, self._pixels)
        except ValueError as error:
            raise FormatError(member.name, f"frame {number} {error}") from None

    def _dialogue(self, shard: ShardToCheck, key: str, text: TarMember, row: Mapping[str, Any] | None) -> None:
        facts = _object(text, DIALOGUE_FIELDS)
        _same(text, facts, {"key": key, "split": shard.split}, "should be")
        media = _list(text, "media", facts["media"], str)
        turns = _list(text, "conversations", facts["conversations"], dict)
        meta = _parsed(text, "meta", facts["meta"])
        if not isinstance(meta, dict):
            raise FormatError(text.name, "meta is no object")
        for turn in turns:
            if turn.keys() != {"from", "value"} or turn["from"] not in ("human", "gpt", "system"):
                raise FormatError(text.name, "a turn is not {from: human, gpt or system, value}")
            if not isinstance(turn["value"], str):
                raise FormatError(text.name, "a turn's value is no text")
        marks = sum(turn["value"].count("<image>") for turn in turns)
        if marks != len(media):
            raise FormatError(text.name, f"has {marks} <image> marks and {len(media)} media")
        if row:
            keys = self._tables["video"]["key"]
            there = {"id": facts["id"], "entry": facts["entry"], "split": facts["split"], "meta": meta}
            there |= {"conversations": turns, "media": media}
            stated = {name: row[name] for name in ("id", "entry", "split")}
            stated |= {name: _parsed(text, f"{name} in the index", row[name]) for name in ("meta", "conversations")}
            _same(text, there, stated | {"media": [keys[number].as_py() for number in row["media"]]}, "the index says")


def _mp4_frames(member: TarMember, facts: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Places and sizes of the frames of an MP4 whose times are those of its json."""
    try:
        offsets, sizes, seconds = mjpeg_frames(member.data)
    except ValueError as error:
        raise FormatError(member.name, str(error)) from None
    stated = np.array(facts["timestamps"])
    if len(seconds) != len(stated):
        raise FormatError(member.name, f"has {len(seconds)} frames, its json says {len(stated)}")
    ticks, scale = frame_ticks(stated, facts["start"] + facts["duration"])
    if (np.abs(seconds - ticks / scale) > 0.01 / scale).any():
        raise FormatError(member.name, "its presentation times are not the timestamps of its json")
    return offsets.tolist(), sizes.tolist()


# JSON -----------------------------------------------------------------------------------------------------------------


def _parsed(member: TarMember, what: str, text: str | bytes) -> Any:
    if len(text) > MAX_JSON:
        raise FormatError(member.name, f"{what} of {len(text):,} bytes is too long to be looked at")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(member.name, f"{what} is not JSON") from None


def _object(member: TarMember, fields: Mapping[str, type | list[type]]) -> dict[str, Any]:
    """The object of a json member: exactly these fields, sorted, of these types."""
    facts = _parsed(member, "it", member.data)
    if not isinstance(facts, dict) or list(facts) != sorted(fields):
        raise FormatError(member.name, "is not an object with the fields of the format, sorted")
    for name, kind in fields.items():
        values, kind = (facts[name], kind[0]) if isinstance(kind, list) else ([facts[name]], kind)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise FormatError(member.name, f"{name} is not of the type {kind.__name__}")
    return facts


def _list(member: TarMember, name: str, text: str, kind: type) -> list[Any]:
    values = _parsed(member, name, text)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise FormatError(member.name, f"{name} is no list of {'objects' if kind is dict else 'texts'}")
    return values


def _same(member: TarMember, there: Mapping[str, Any], stated: Mapping[str, Any], says: str) -> None:
    for name, value in stated.items():
        if there[name] != value:
            raise FormatError(member.name, f"{name} is {there[name]!r:.60}, {says} {value!r:.60}")


def _check_lists(member: TarMember, facts: Mapping[str, Any]) -> None:
    """One entry a stored frame, in time order; the sample names each of them."""
    index, seconds, sample = (facts[name] for name in ("frame_index", "timestamps", "sample"))
    if not index or len(index) != len(seconds):
        raise FormatError(member.name, f"has {len(index)} frame_index and {len(seconds)} timestamps")
    if index[0] < 0 or index[-1] >= facts["vlen"] or any(a >= b for a, b in zip(index, index[1:], strict=False)):
        raise FormatError(member.name, "frame_index does not ascend within vlen")
    if not np.isfinite(seconds).all() or seconds[0] < 0 or any(np.diff(seconds) < 0):
        raise FormatError(member.name, "timestamps are not seconds in time order")
    if not np.isfinite([facts[name] for name in ("start", "fps", "duration")]).all():
        raise FormatError(member.name, "start, fps and duration are not numbers")
    if set(sample) != set(range(len(index))):
        raise FormatError(member.name, "sample does not name each stored frame")
