"""Check one shard against docs/format.md and its rows of the index.

This is written from the document and shares no code with the writer, so it also finds mistakes of the writer. A video
or image is parsed only if its digest is right, so that no decoder reads damaged bytes.
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
import xxhash

from framestream.pipeline.media.errors import MAX_PIXELS
from framestream.pipeline.media.jpeg import decode_jpeg, jpeg_size
from framestream.pipeline.media.mjpeg_mp4 import frame_ticks, mjpeg_frames
from framestream.tools.verify.findings import Findings
from framestream.tools.verify.tar import PlainTar, TarMember, UnreadableTarError

MEMBERS = {"video": ("mp4", "json"), "image": ("jpg", "json"), "dialogue": ("json",)}
KEYS = {folder: re.compile(f"{folder[0]}[0-9a-f]{{24}}") for folder in MEMBERS}
MAX_JSON = 1 << 26  #: bytes of a json member that is parsed
BATCH = 256  #: index rows that are converted to Python objects at a time

#: Fields of the json member of a media item with their types; for a list the type of its items, in brackets.
MEDIA_FIELDS: Mapping[str, type | list[type]] = {
    **dict.fromkeys(("key", "kind", "source", "sha256", "dialogues"), str),
    **dict.fromkeys(("width", "height", "source_width", "source_height", "vlen"), int),
    **dict.fromkeys(("start", "fps", "duration"), float),
    **{"salvaged": bool, "sample": [int], "frame_index": [int], "timestamps": [float]},
}
DIALOGUE_FIELDS = dict.fromkeys(("key", "id", "entry", "split", "media", "conversations", "meta"), str)


@dataclass(frozen=True, slots=True)
class ShardToCheck:
    """A shard, and what the index says about it."""

    path: Path
    folder: str
    split: str
    samples: int | None = None  #: None without an index
    bytes: int = 0
    sha256: str = ""
    first_row: int = 0  #: row of its first sample in media.arrow or dialogues.arrow

    @property
    def name(self) -> str:
        """Return folder and file name, for messages."""
        return f"{self.folder}/{self.path.name}"


@dataclass(slots=True)
class ShardResult:
    """Findings of one shard, and what was read of it."""

    findings: Findings
    samples: int = 0
    frames: int = 0
    bytes: int = 0  #: of the file
    md5: str = ""  #: of the file; empty if the shard has findings


class FormatError(Exception):
    """A sample is wrong, and the rest of it is skipped. Its two arguments are the member and the problem."""


class ShardChecker:
    """Check shards against the tables of an index. Without tables (None), check only that shards are consistent.

    Args:
        deep: also decode every frame.
        max_listed: findings to list for each shard.
    """

    def __init__(self, media: pa.Table | None, dialogues: pa.Table | None, deep: bool, max_listed: int) -> None:
        self._tables = {"video": media, "image": media, "dialogue": dialogues}
        self._deep, self._max_listed = deep, max_listed
        self._pixels = np.empty((0, 0, 3), dtype=np.uint8)

    def check(self, shard: ShardToCheck) -> ShardResult:
        """Read a shard front to end."""
        checked = ShardResult(Findings(self._max_listed))
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
        tar = PlainTar(file, lambda member, problem: findings.add(f"{shard.name}: {member}".rstrip(": "), problem))
        checked.bytes = tar.size
        indexed = shard.samples is not None
        if indexed and tar.size != shard.bytes:
            findings.add(shard.name, f"has {tar.size:,} bytes, the index says {shard.bytes:,}")
        try:
            self._check_samples(shard, tar, checked)
            if indexed and checked.samples != shard.samples:
                raise UnreadableTarError(f"it has {checked.samples:,} samples, the index says {shard.samples:,}")
            self._check_offsets(shard, tar.sample_offsets, findings)
        except UnreadableTarError as error:
            findings.add(shard.name, f"{error}; the rest of the shard was not checked")
        try:
            sha256, md5 = tar.digests()
            if indexed and sha256 != shard.sha256:
                findings.add(shard.name, "its sha256 is not the one in the index")
            checked.md5 = "" if findings.count else md5
        except UnreadableTarError as error:
            findings.add(shard.name, str(error))

    def _check_samples(self, shard: ShardToCheck, tar: PlainTar, checked: ShardResult) -> None:
        rows = self._rows(shard)
        seen: set[str] = set()
        for key, members in tar.samples(MEMBERS[shard.folder]):
            if not KEYS[shard.folder].fullmatch(key):
                raise UnreadableTarError(f"{key} is not a key of the folder {shard.folder}")
            if key in seen:
                raise UnreadableTarError(f"the key {key} occurs twice")
            seen.add(key)
            row = next(rows, None)
            if shard.samples is not None and (row is None or row["key"] != key):
                expected = row["key"] if row else "no more"
                raise UnreadableTarError(f"sample {checked.samples} is {key}, the index says {expected}")
            try:
                if shard.folder == "dialogue":
                    self._check_dialogue(shard, key, members[0], row)
                else:
                    data, text = members
                    checked.frames += self._check_media(shard, key, data, text, row)
            except FormatError as error:
                checked.findings.add(f"{shard.name}: {error.args[0]}", error.args[1])
            checked.samples += 1

    def _rows(self, shard: ShardToCheck) -> Iterator[dict[str, Any]]:
        """Yield the index rows of the shard's samples; none without an index."""
        table = self._tables[shard.folder]
        if table is None:
            return
        end = shard.first_row + (shard.samples or 0)
        for start in range(shard.first_row, end, BATCH):
            yield from table.slice(start, min(BATCH, end - start)).to_pylist()

    def _check_offsets(self, shard: ShardToCheck, offsets: Sequence[int], findings: Findings) -> None:
        """Check that NAME.tar.idx holds ``offsets``."""
        path, expected = Path(f"{shard.path}.idx"), np.array(offsets, dtype="<u8").tobytes()
        try:
            with open(path, "rb") as file:
                same = file.read(len(expected) + 1) == expected
        except OSError as error:
            findings.add(f"{shard.name}.idx", f"cannot be read ({error.strerror})")
        else:
            if not same:
                findings.add(f"{shard.name}.idx", "does not hold the offsets of the shard's samples")

    # Samples ----------------------------------------------------------------------------------------------------------

    def _check_media(
        self, shard: ShardToCheck, key: str, data: TarMember, text: TarMember, row: Mapping[str, Any] | None
    ) -> int:
        """Check a video or an image. Returns how many frames were checked."""
        facts = _parse_fields(text, MEDIA_FIELDS)
        _require_equal(text, facts, {"key": key, "kind": shard.folder}, "should be")
        digest = hashlib.sha256(data.data).hexdigest()
        if row:
            _require_equal(text, facts, {name: row[name] for name in facts.keys() & row.keys()}, "the index says")
            actual = {"offset": data.data_offset, "size": len(data.data), "split": shard.split, "sha256": digest}
            _require_equal(data, actual, {name: row[name] for name in actual}, "the index says")
        if digest != facts["sha256"]:
            raise FormatError(data.name, "its sha256 is not the one in its json")
        _parse_list(text, "dialogues", facts["dialogues"], dict)
        _check_lists(text, facts)
        count, size = len(facts["frame_index"]), (facts["width"], facts["height"])
        if size[0] * size[1] > MAX_PIXELS or min(size) < 1:
            raise FormatError(text.name, f"{size[0]} x {size[1]} pixels is not a valid frame size")
        starts, lengths = _mp4_frames(data, facts) if shard.folder == "video" else ([0], [len(data.data)])
        if row and (row["frame_offset"], row["frame_size"]) != (
            [data.data_offset + start for start in starts],
            lengths,
        ):
            raise FormatError(data.name, f"frame_offset and frame_size of the index do not match its {count} frames")
        frames = [data.data[start : start + length] for start, length in zip(starts, lengths, strict=True)]
        stated = row.get("frame_digest") if row else None  # None in roots from before there were digests
        if stated is not None and stated != [xxhash.xxh3_64_intdigest(jpeg) & 0xFFFFFFFF for jpeg in frames]:
            raise FormatError(data.name, f"frame_digest of the index does not match its {count} frames")
        for number, jpeg in enumerate(frames):
            self._check_frame(data, number, jpeg, size, exact=shard.folder == "video")
        return count

    def _check_frame(self, member: TarMember, number: int, jpeg: bytes, size: tuple[int, int], exact: bool) -> None:
        """Check a JPEG of this width and height. With ``exact``, nothing may follow its end."""
        try:
            if not jpeg.startswith(b"\xff\xd8") or (exact and not jpeg.endswith(b"\xff\xd9")):
                raise ValueError("does not begin and end as a JPEG")
            if jpeg_size(jpeg) != size:
                raise ValueError("is {} x {}, its json says {} x {}".format(*jpeg_size(jpeg), *size))
            if self._deep:
                if self._pixels.shape[1::-1] != size:
                    self._pixels = np.empty((*size[::-1], 3), dtype=np.uint8)
                decode_jpeg(jpeg, self._pixels)
        except ValueError as error:
            raise FormatError(member.name, f"frame {number} {error}") from None

    def _check_dialogue(self, shard: ShardToCheck, key: str, text: TarMember, row: Mapping[str, Any] | None) -> None:
        facts = _parse_fields(text, DIALOGUE_FIELDS)
        _require_equal(text, facts, {"key": key, "split": shard.split}, "should be")
        media = _parse_list(text, "media", facts["media"], str)
        turns = _parse_list(text, "conversations", facts["conversations"], dict)
        meta = _parse(text, "meta", facts["meta"])
        if not isinstance(meta, dict):
            raise FormatError(text.name, "meta is not an object")
        for turn in turns:
            if turn.keys() != {"from", "value"} or turn["from"] not in ("human", "gpt", "system"):
                raise FormatError(text.name, "a turn is not {from: human, gpt or system, value}")
            if not isinstance(turn["value"], str):
                raise FormatError(text.name, "a turn's value is not text")
        marks = sum(turn["value"].count("<image>") for turn in turns)
        if marks != len(media):
            raise FormatError(text.name, f"has {marks} <image> marks and {len(media)} media")
        if row:
            actual = {"id": facts["id"], "entry": facts["entry"], "split": facts["split"], "meta": meta}
            actual |= {"conversations": turns, "media": media}
            expected = {name: row[name] for name in ("id", "entry", "split")}
            expected |= {name: _parse(text, f"{name} in the index", row[name]) for name in ("meta", "conversations")}
            expected["media"] = self._media_keys(row["media"])
            _require_equal(text, actual, expected, "the index says")

    def _media_keys(self, rows: Sequence[int]) -> list[str]:
        media = self._tables["video"]
        return [] if media is None else [media["key"][row].as_py() for row in rows]


def _mp4_frames(member: TarMember, facts: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Return the offsets and sizes of the frames of an MP4, and check its times against its json."""
    try:
        offsets, sizes, seconds = mjpeg_frames(member.data)
    except ValueError as error:
        raise FormatError(member.name, str(error)) from None
    timestamps = np.array(facts["timestamps"])
    if len(seconds) != len(timestamps):
        raise FormatError(member.name, f"has {len(seconds)} frames, its json says {len(timestamps)}")
    ticks, scale = frame_ticks(timestamps, facts["start"] + facts["duration"])
    if (np.abs(seconds - ticks / scale) > 0.01 / scale).any():
        raise FormatError(member.name, "its presentation times are not the timestamps of its json")
    return offsets.tolist(), sizes.tolist()


# JSON -----------------------------------------------------------------------------------------------------------------


def _parse(member: TarMember, what: str, text: str | bytes) -> Any:
    if len(text) > MAX_JSON:
        raise FormatError(member.name, f"{what} of {len(text):,} bytes is too long to be parsed")
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise FormatError(member.name, f"{what} is not JSON") from None


def _parse_fields(member: TarMember, fields: Mapping[str, type | list[type]]) -> dict[str, Any]:
    """Parse the object of a json member, which must have exactly these fields, sorted, of these types."""
    facts = _parse(member, "it", member.data)
    if not isinstance(facts, dict) or list(facts) != sorted(fields):
        raise FormatError(member.name, "is not an object with the fields of the format, sorted")
    for name, kind in fields.items():
        values, kind = (facts[name], kind[0]) if isinstance(kind, list) else ([facts[name]], kind)
        if not isinstance(values, list) or any(type(value) is not kind for value in values):
            raise FormatError(member.name, f"{name} is not of the type {kind.__name__}")
    return facts


def _parse_list(member: TarMember, name: str, text: str, kind: type) -> list[Any]:
    values = _parse(member, name, text)
    if not isinstance(values, list) or any(type(value) is not kind for value in values):
        raise FormatError(member.name, f"{name} is not a list of {'objects' if kind is dict else 'texts'}")
    return values


def _require_equal(member: TarMember, actual: Mapping[str, Any], expected: Mapping[str, Any], says: str) -> None:
    """Compare the values of ``expected`` with those of ``actual``; ``says`` introduces an expected value."""
    for name, value in expected.items():
        if actual[name] != value:
            raise FormatError(member.name, f"{name} is {actual[name]!r:.60}, {says} {value!r:.60}")


def _check_lists(member: TarMember, facts: Mapping[str, Any]) -> None:
    """Check that lists have one entry for each stored frame, in time order, and that ``sample`` names every frame."""
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
