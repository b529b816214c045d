"""The bytes of a shard: JPEG frames, MJPEG in MP4, USTAR shards and the small files that other readers want.

A shard is a plain USTAR file whose members are ``KEY.EXT``, the members of a sample side by side, every sample of a
folder with the same extensions::

    video/train-000000.tar      KEY.mp4 KEY.json    a clip; every frame of the MP4 is one whole JPEG
    image/train-000000.tar      KEY.jpg KEY.json    a still
    dialogue/train-000000.tar   KEY.json            a conversation with the keys of its media

Nothing else in the project writes these bytes, and ``tools/verification.py`` checks them from docs/format.md. The same
input gives the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import numpy as np
import simplejpeg
import yaml

from pipeline.files import atomic_file, write_atomic

TIME_SCALE = 90_000  #: ticks a second of the MP4 clock
COARSE_TIME_SCALE = 1_000  #: used where two frames lie so far apart (over 6 hours) that 90 kHz ticks overflow
BLOCK, RECORD = 512, 10_240  #: sizes in bytes that USTAR rounds members and files up to
MAX_MEMBER = 8**11 - 1  #: largest member in bytes that a USTAR header can state
ENERGON_VERSION = "7.4.1"  #: the Megatron-Energon release whose folder layout is written

_COMPACT = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
KEY = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
EXTENSION = re.compile(r"[a-z][a-z0-9]*")
#: extensions that webdataset or datasets decode, unpack or unpickle by themselves
TAKEN = frozenset(
    ("raw", "im", "ps", "bw", "mpg", "h5", "cls", "id", "index", "inx", "pkl", "pyd", "pth", "gz", "zst", "xz", "bz2")
)


# Keys and JSON members ------------------------------------------------------------------------------------------------


def media_key(kind: str, identity: str) -> str:
    """Key of a media item (``kind`` video or image): its letter and 24 hex digits of the identity's sha256."""
    return {"video": "v", "image": "i"}[kind] + hashlib.sha256(identity.encode()).hexdigest()[:24]


def dialogue_key(identity: str) -> str:
    """Key of a dialogue: ``d`` and 24 hex digits of the identity's sha256."""
    return "d" + hashlib.sha256(identity.encode()).hexdigest()[:24]


def json_text(value: Any) -> str:
    """``value`` as compact JSON with sorted keys; the same value gives the same text."""
    return _COMPACT.encode(value)


def media_json(
    *,
    key: str,
    kind: str,
    source: str,
    start: float,
    width: int,
    height: int,
    source_width: int,
    source_height: int,
    vlen: int,
    fps: float,
    duration: float,
    salvaged: bool,
    sample: Sequence[int],
    frame_index: Sequence[int],
    timestamps: Sequence[float],
    sha256: str,
    dialogues: Sequence[Mapping[str, Any]] = (),
) -> bytes:
    """The ``json`` member of a media sample; the types are the same in every sample.

    ``start`` is where the clip begins in its source (seconds), ``sample`` the sampler's list of places in the stored
    frames, ``frame_index`` and ``timestamps`` (true source seconds) one entry per stored frame, ``sha256`` that of the
    media member, ``dialogues`` the known dialogues about this item alone (kept as JSON text).
    """
    value = {
        "key": str(key),
        "kind": str(kind),
        "source": str(source),
        "start": float(start),
        "width": int(width),
        "height": int(height),
        "source_width": int(source_width),
        "source_height": int(source_height),
        "vlen": int(vlen),
        "fps": float(fps),
        "duration": float(duration),
        "salvaged": bool(salvaged),
        "sample": [int(place) for place in sample],
        "frame_index": [int(frame) for frame in frame_index],
        "timestamps": [float(second) for second in timestamps],
        "sha256": str(sha256),
        "dialogues": json_text([dict(dialogue) for dialogue in dialogues]),
    }
    return json_text(value).encode()


def dialogue_json(
    *,
    key: str,
    id: str,
    entry: str,
    split: str,
    media: Sequence[str],
    conversations: Sequence[Mapping[str, str]],
    meta: Mapping[str, Any],
) -> bytes:
    """The ``json`` member of a dialogue; ``media`` (keys in order of use), ``conversations``, ``meta`` as JSON text.

    Text, because readers that infer a schema cannot join an empty list with a list of strings.
    """
    value = {
        "key": str(key),
        "id": str(id),
        "entry": str(entry),
        "split": str(split),
        "media": json_text([str(item) for item in media]),
        "conversations": json_text([{"from": turn["from"], "value": turn["value"]} for turn in conversations]),
        "meta": json_text(dict(meta)),
    }
    return json_text(value).encode()


# Frames ---------------------------------------------------------------------------------------------------------------


def encode_jpeg(frame: np.ndarray, quality: int, subsampling: str) -> bytes:
    """JPEG of an RGB frame (H, W, 3) uint8; ``subsampling`` is 420, 422 or 444. libjpeg-turbo, accurate DCT."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(frame), quality, "RGB", subsampling)


def decode_jpeg(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """RGB pixels (H, W, 3) uint8 of a JPEG, decoded into ``out`` (C-contiguous, of that shape) where given.

    Raises:
        ValueError: the bytes are not one whole JPEG, or its size is not that of ``out``.
    """
    if out is None:
        return simplejpeg.decode_jpeg(data, "RGB")
    try:
        if simplejpeg.decode_jpeg(data, "RGB", buffer=out).shape == out.shape:
            return out
    except ValueError:  # no JPEG, or a larger one
        if jpeg_size(data) == out.shape[1::-1]:
            raise
    width, height = jpeg_size(data)
    raise ValueError(f"a JPEG of {width} x {height} does not fit an array of shape {out.shape}")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels, from the header of a JPEG.

    Raises:
        ValueError: no JPEG header.
    """
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    return width, height


def frame_ticks(seconds: np.ndarray, end: float) -> tuple[np.ndarray, int]:
    """Presentation times int64 (T,) of frames at ``seconds`` (T,) up to ``end``, and how many of them make a second.

    The nearest ticks; where two frames would share one, the later moves on by one tick.
    """
    gaps = np.diff(seconds, append=max(end, seconds[-1]))
    scale = TIME_SCALE if gaps.max() * TIME_SCALE < 2**31 - TIME_SCALE else COARSE_TIME_SCALE
    # the distance to its own index never falls, so that ticks rise by at least one a frame
    index = np.arange(len(seconds))
    return np.maximum.accumulate(np.rint(seconds * scale).astype(np.int64) - index) + index, scale


def mux_mjpeg(jpegs: Sequence[bytes], timestamps: np.ndarray, end: float, width: int, height: int) -> bytes:
    """Put JPEGs of one size into an MP4 whose presentation times are the source's.

    Args:
        jpegs: T whole JPEGs.
        timestamps: float64 (T,), seconds in the source, ascending, not negative; equal ones move on by one tick.
        end: second at which the last frame stops being shown.
        width: of every JPEG, in pixels.
        height: of every JPEG, in pixels.

    Returns:
        The MP4. Frame times are exact to 1/90000 s (to 1 ms where frames lie more than 6 hours apart); a first frame
        later than 0 keeps its time through an edit list.

    Raises:
        ValueError: no frames, counts that differ, or times that are not finite, ascending and at least 0.
    """
    seconds = np.asarray(timestamps, dtype=np.float64)
    if len(jpegs) == 0 or seconds.shape != (len(jpegs),):
        raise ValueError(f"{len(jpegs)} frames with timestamps of shape {seconds.shape}; give one timestamp a frame")
    if not (np.isfinite(seconds).all() and np.isfinite(end) and seconds[0] >= 0 and (np.diff(seconds) >= 0).all()):
        raise ValueError("timestamps must be finite, ascending and at least 0")
    ticks, scale = frame_ticks(seconds, end)
    durations = np.diff(ticks, append=max(round(end * scale), int(ticks[-1]) + 1))

    buffer = io.BytesIO()
    options = {"fflags": "+bitexact", "movie_timescale": str(scale), "video_track_timescale": str(scale)}
    with av.open(buffer, "w", format="mp4", options=options) as container:
        base = Fraction(1, scale)
        stream = container.add_mux_stream("mjpeg", width=width, height=height, time_base=base)
        for jpeg, tick, duration in zip(jpegs, ticks.tolist(), durations.tolist(), strict=True):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base, packet.is_keyframe = stream, base, True
            packet.pts, packet.dts, packet.duration = tick, tick, duration
            container.mux(packet)
    return buffer.getvalue()


def mjpeg_frames(mp4: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the JPEGs of an MP4 lie: offsets int64 (T,), sizes int32 (T,), timestamps float64 (T,) in seconds.

    Raises:
        ValueError: the bytes are no MP4 with one MJPEG stream.
    """
    try:
        with av.open(io.BytesIO(mp4)) as container:
            if len(container.streams) != 1:
                raise ValueError(f"expected one track, found {len(container.streams)}")
            stream = container.streams.video[0]
            if stream.codec_context.name != "mjpeg":
                raise ValueError(f"expected MJPEG frames, found {stream.codec_context.name}")
            places = [(entry.pos, entry.size, entry.timestamp) for entry in stream.index_entries]
            base = stream.time_base
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"not an MP4 of JPEG frames ({error})") from None
    offsets, sizes, ticks = np.array(places, dtype=np.int64).reshape(-1, 3).T
    return offsets.copy(), sizes.astype(np.int32), ticks * base.numerator / base.denominator


# Shards ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A finished shard, as the index and other readers need it."""

    name: str  #: file name, such as train-000000.tar
    samples: int
    bytes: int  #: of the file
    sha256: str
    md5: str
    sample_offsets: tuple[int, ...]  #: header of each sample's first member, then the place after the last member

    @property
    def split(self) -> str:
        """``train`` or ``val``, the part of the name before the number."""
        return self.name.rpartition("-")[0]


class ShardWriter:
    """Write one shard; a context manager. The file appears under its name when the block ends without an error.

    A writer to which nothing was added leaves no file, because readers refuse empty shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.bytes = 0  #: written so far
        self.sample_offsets: list[int] = []
        self.sha256 = ""  #: of the finished file
        self.md5 = ""  #: of the finished file
        self._keys: set[str] = set()
        self._extensions: tuple[str, ...] = ()
        self._end = 0
        self._hashes = (hashlib.sha256(), hashlib.md5(usedforsecurity=False))
        self._stack = contextlib.ExitStack()

    @property
    def samples(self) -> int:
        """Samples added so far."""
        return len(self.sample_offsets)

    @property
    def info(self) -> ShardInfo:
        """The finished shard (after the block)."""
        offsets = (*self.sample_offsets, self._end)
        return ShardInfo(self.path.name, self.samples, self.bytes, self.sha256, self.md5, offsets)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self.samples:
            self._end = self.bytes
            self._write(bytes(2 * BLOCK + -(self.bytes + 2 * BLOCK) % RECORD))
            self.sha256, self.md5 = (digest.hexdigest() for digest in self._hashes)
        self._stack.__exit__(kind, error, trace)

    def add(self, key: str, members: Mapping[str, bytes]) -> dict[str, tuple[int, int]]:
        """Append the sample ``key`` with its ``members`` by extension; returns (offset, size) of each member's bytes.

        Raises:
            ValueError: a bad or repeated key, extensions unlike those of the samples before, or a member over 8 GiB.
        """
        extensions = tuple(members)
        if not KEY.fullmatch(key):
            raise ValueError(f"{self.path}: key {key!r}: must start with a letter and hold letters, digits, _ and -")
        if key in self._keys:
            raise ValueError(f"{self.path}: key {key!r}: is in the shard already")
        if self._extensions and extensions != self._extensions:
            raise ValueError(f"{self.path}: {key}: has {extensions}, the samples before have {self._extensions}")
        for extension, data in members.items():
            if not EXTENSION.fullmatch(extension) or extension in TAKEN or len(f"{key}.{extension}") > 100:
                raise ValueError(f"{self.path}: {key}.{extension}: not a name that every reader takes as it is")
            if len(data) > MAX_MEMBER:
                raise ValueError(f"{self.path}: {key}.{extension}: {len(data)} bytes are more than USTAR can hold")
        if not members:
            raise ValueError(f"{self.path}: {key}: a sample needs at least one member")
        if not self.samples:
            self._file = self._stack.enter_context(atomic_file(self.path))
        self._extensions = extensions
        self._keys.add(key)
        self.sample_offsets.append(self.bytes)
        places = {}
        for extension, data in members.items():
            header = tarfile.TarInfo(f"{key}.{extension}")  # mode 0644, time, user and group 0, no names
            header.size = len(data)
            self._write(header.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
            places[extension] = (self.bytes, len(data))
            self._write(data)
            self._write(bytes(-len(data) % BLOCK))
        return places

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self.bytes += len(data)
        for digest in self._hashes:
            digest.update(data)


def read_reader_files(folder: str | Path) -> list[ShardInfo]:
    """The shards that ``write_reader_files`` described in ``folder``, in order of name; ``sha256`` is empty."""
    folder, shards = Path(folder), []
    for path in folder.glob("shardindex*.json"):
        for part in json.loads(path.read_bytes())["shardlist"]:
            offsets = np.frombuffer((folder / f"{part['url']}.idx").read_bytes(), dtype="<u8")
            numbers = (part["nsamples"], part["filesize"], "", part["md5sum"])
            shards.append(ShardInfo(part["url"], *numbers, tuple(offsets.tolist())))
    return sorted(shards, key=lambda shard: shard.name)


def write_reader_files(folder: str | Path, shards: Sequence[ShardInfo]) -> None:
    """Write what Megatron-Energon and wids expect beside the shards of one folder (video, image or dialogue).

    ``.nv-meta/`` and ``NAME.tar.idx`` are Energon's (its parsers refuse unknown keys, so nothing of ours is added);
    ``shardindex.json`` (train) and ``shardindex-val.json`` are wids shard indexes.
    """
    folder = Path(folder)
    shards = sorted(shards, key=lambda shard: shard.name)
    for shard in shards:
        write_atomic(folder / f"{shard.name}.idx", np.array(shard.sample_offsets, dtype="<u8").tobytes())
    splits = {split: [shard for shard in shards if shard.split == split] for split in ("train", "val", "test")}
    for split, parts in splits.items():
        if parts:
            index = {
                "__kind__": "wids-shard-index-v1",
                "wids_version": 1,
                "name": f"{folder.name}-{split}",
                "shardlist": [
                    {"url": part.name, "nsamples": part.samples, "filesize": part.bytes, "md5sum": part.md5}
                    for part in parts
                ],
            }
            name = "shardindex.json" if split == "train" else f"shardindex-{split}.json"
            write_atomic(folder / name, (json.dumps(index, indent=1) + "\n").encode())

    meta = folder / ".nv-meta"
    meta.mkdir(parents=True, exist_ok=True)
    info = {"energon_version": ENERGON_VERSION, "shard_counts": {shard.name: shard.samples for shard in shards}}
    parts = {split: [part.name for part in parts] for split, parts in splits.items()}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_atomic(meta / ".info.json", (json.dumps(info, indent=1) + "\n").encode())
    write_atomic(meta / "split.yaml", yaml.safe_dump({"exclude": [], "split_parts": parts}, sort_keys=False).encode())
    write_atomic(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False).encode())
