"""Settings of what is built and read: annotation files, shards, and mixes of shard roots."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.config.schema import ManifestError, spec

READERS = ("decord", "img", "frame", "gif", "av")  #: how a video is read

FOLDER_READERS = ("img", "frame")  #: readers of a folder of frames

DECODERS = ("auto", "pyav", "decord", "ffmpeg")  #: programs that decode videos

HWACCELS = ("none", "cuda", "vaapi", "qsv")  #: kinds of devices that decode videos

SAMPLING_PATTERN = re.compile(r"all|(first[234]?|end|random):([0-9]{1,12})(%?)")  #: which samples of a file are used

SAMPLING_HELP = "all, first:N, first2:N, first3:N, first4:N, end:N or random:N (N a count or P%)"


def check_sampling(sampling: str) -> None:
    """Check a sampling of samples or dialogues.

    Raises:
        ManifestError: it has another form, or is more than 100 %.
    """
    match = SAMPLING_PATTERN.fullmatch(sampling)
    if not match:
        raise ManifestError(f"sampling: {sampling!r:.60} is not {SAMPLING_HELP}")
    if match[3] and int(match[2]) > 100:
        raise ManifestError(f"sampling: {sampling} is more than 100%; lower it")


def entry_name(annotation: str) -> str:
    """Return the name of an entry that states none: its annotation file's name without extensions."""
    return Path(annotation).name.split(".")[0]


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """One dataset entry: an annotation file, the folder of its media, and which samples are used."""

    annotation: str = field(
        metadata=spec(path="any", doc="json, jsonl or parquet; a local path, hf:OWNER/NAME:PATH or a web address")
    )
    root: str = field(
        default="",
        metadata=spec(
            path="any", doc="folder that the annotation's media paths are relative to, or a name in the root map"
        ),
    )
    sampling: str = field(default="all", metadata=spec(doc=SAMPLING_HELP))
    reader: str = field(default="decord", metadata=spec(choices=READERS))
    media_type: str = field(default="auto", metadata=spec(choices=("auto", "image", "video", "text", "mix")))
    split: str = field(
        default="train",
        metadata=spec(choices=("train", "val"), doc="val is excluded from training and used for scoring"),
    )
    name: str = field(
        default="", metadata=spec(doc="name in ledgers and reports; the stem of the annotation file if empty")
    )
    samples: int | None = field(
        default=None, metadata=spec(low=0, high=10**12, doc="published number of samples, if stated")
    )

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", entry_name(self.annotation))
        check_sampling(self.sampling)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The entries of a stage, the root map that says where media are stored, and how shards are built."""

    entries: tuple[EntryConfig, ...]
    roots: str = field(
        default="", metadata=spec(path="local", doc="YAML file that maps the root of an entry to a folder or address")
    )
    cache: str = field(
        default="",
        metadata=spec(path="local", doc="folder for downloaded annotation files; ~/.cache/framestream if empty"),
    )
    text_placeholder: str = field(
        default="convert",
        metadata=spec(choices=("convert", "refuse"), doc="<video> in a turn becomes <image>, or the sample is refused"),
    )
    shard_mb: int = field(
        default=64,
        metadata=spec(
            low=1, high=100_000, doc="estimated megabytes of one shard, which decide which media it contains"
        ),
    )
    decoder: str = field(
        default="auto",
        metadata=spec(choices=DECODERS, doc="program that decodes videos; auto is PyAV, and ffmpeg for animated WebP"),
    )
    hwaccel: str = field(
        default="none", metadata=spec(choices=HWACCELS, doc="device that decodes videos instead of the processor")
    )
    decode_timeout: int = field(
        default=600, metadata=spec(low=1, high=604_800, doc="seconds that building one media item may take")
    )
    fetch_timeout: int = field(
        default=1800,
        metadata=spec(low=1, high=604_800, doc="seconds that fetching one media file may take, with all retries"),
    )
    fetch_mb: int = field(
        default=8192, metadata=spec(low=1, high=10_000_000, doc="largest media file that is fetched, in megabytes")
    )

    def __post_init__(self) -> None:
        if not self.entries:
            raise ManifestError("entries: the list is empty; name at least one annotation file")
        if self.decoder == "decord" and self.hwaccel != "none":
            raise ManifestError(f"hwaccel: decord has no {self.hwaccel}; set decoder: pyav or ffmpeg, or hwaccel: none")


@dataclass(frozen=True, kw_only=True)
class MixEntryConfig:
    """How much of one entry of a shard root goes into a mix."""

    entry: str = field(metadata=spec(doc="name of the entry in the shards"))
    sampling: str = field(
        default="all", metadata=spec(doc=f"which of its dialogues, in the order of the index: {SAMPLING_HELP}")
    )
    repeat: float | None = field(
        default=None,
        metadata=spec(
            low=0,
            high=1000,
            doc="appearances of each dialogue in an epoch, instead of the root's; 0 excludes the entry",
        ),
    )
    cap: int | None = field(
        default=None,
        metadata=spec(
            low=1, high=10**12, doc="most dialogues of the entry in an epoch; the others follow in later epochs"
        ),
    )
    min: int | None = field(default=None, metadata=spec(low=1, high=100_000, doc="frames.min of its videos"))
    max: int | None = field(default=None, metadata=spec(low=1, high=100_000, doc="frames.max of its videos"))

    def __post_init__(self) -> None:
        check_sampling(self.sampling)

    def bound_frames(self, frames: FramesConfig) -> FramesConfig:
        """Return ``frames`` with the entry's own ``min`` and ``max``."""
        bounds = {name: getattr(self, name) for name in ("min", "max") if getattr(self, name) is not None}
        return dataclasses.replace(frames, **bounds)


@dataclass(frozen=True, kw_only=True)
class MixRootConfig:
    """One shard root of a mix. All dialogues of entries that it does not name are used, with the root's ``repeat``."""

    root: str = field(metadata=spec(path="any", doc="folder or address of finished shards, such as shards/stage2"))
    repeat: float = field(
        default=1.0, metadata=spec(low=0, high=1000, doc="how often each dialogue appears in an epoch")
    )
    weight: float | None = field(
        default=None, metadata=spec(low=0, high=1_000_000, doc="share of an epoch; set it for every root or for none")
    )
    entries: tuple[MixEntryConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.entry for entry in self.entries]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ManifestError(f"entries[{number}].entry: {name} is listed twice; give its settings once")
        if not self.repeat and not any(entry.repeat for entry in self.entries):
            raise ManifestError("repeat: is 0 and no entry has its own, so nothing would be read; remove the root")
