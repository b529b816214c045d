"""TODO."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.config.schema import ManifestError, spec

READERS = ("decord", "img", "frame", "gif", "av")  #: of a video

FOLDER_READERS = ("img", "frame")  #: of those, the ones that read a folder of frames

SAMPLING_PATTERN = re.compile(r"all|(first[234]?|end|random):([0-9]+)(%?)")  #: which samples an entry takes of its file

SAMPLING_HELP = "all, first:N, first2:N, first3:N, first4:N, end:N or random:N (N a count or P%)"


def entry_name(annotation: str) -> str:
    """Return the name of an entry that states none: its annotation file's name without extensions."""
    return Path(annotation).name.split(".")[0]


@dataclass(frozen=True, kw_only=True)
class EntryConfig:
    """One dataset entry: an annotation file, where its media lie and how to take samples of it."""

    annotation: str = field(
        metadata=spec(doc="json, jsonl or parquet; a local path, hf:OWNER/NAME:PATH or a web address")
    )
    root: str = field(
        default="",
        metadata=spec(doc="folder that the annotation's media paths are relative to, or a name in the root map"),
    )
    sampling: str = field(default="all", metadata=spec(doc=SAMPLING_HELP))
    reader: str = field(default="decord", metadata=spec(choices=READERS))
    media_type: str = field(default="auto", metadata=spec(choices=("auto", "image", "video", "text", "mix")))
    split: str = field(
        default="train", metadata=spec(choices=("train", "val"), doc="val is held out of training and used for scoring")
    )
    name: str = field(default="", metadata=spec(doc="name in ledgers and reports; the annotation file's stem if empty"))
    samples: int | None = field(
        default=None, metadata=spec(low=0, doc="number of samples as published, where it is stated")
    )

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", entry_name(self.annotation))
        if not SAMPLING_PATTERN.fullmatch(self.sampling):
            raise ManifestError(f"sampling: {self.sampling!r} is not {SAMPLING_HELP}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read: the entries, and the user's root map that says where media really are."""

    entries: tuple[EntryConfig, ...]
    roots: str = field(default="", metadata=spec(doc="YAML file that maps an entry's root to a place that can be read"))
    cache: str = field(
        default="", metadata=spec(doc="folder of fetched annotation files; ~/.cache/framestream if empty")
    )
    text_placeholder: str = field(
        default="convert", metadata=spec(choices=("convert", "refuse"), doc="what to do with <video> in a turn")
    )
    shard_mb: int = field(
        default=64, metadata=spec(low=1, doc="estimated megabytes of one shard, which decide what goes into it")
    )
    decode_timeout: int = field(default=600, metadata=spec(low=1, doc="seconds that building one media item may take"))
    fetch_timeout: int = field(
        default=1800, metadata=spec(low=1, doc="seconds that fetching one media file may take, with all retries")
    )
    fetch_mb: int = field(default=8192, metadata=spec(low=1, doc="megabytes of the largest media file that is fetched"))

    def __post_init__(self) -> None:
        if not self.entries:
            raise ManifestError("entries: the list is empty; name at least one annotation file")


@dataclass(frozen=True, kw_only=True)
class MixEntryConfig:
    """What is taken of one entry of a shard root that is mixed."""

    entry: str = field(metadata=spec(doc="name of the entry as the shards were built"))
    sampling: str = field(
        default="all", metadata=spec(doc=f"of its dialogues in the order of the index: {SAMPLING_HELP}")
    )
    repeat: float | None = field(
        default=None, metadata=spec(low=0, doc="times an epoch, in place of the root's; 0 leaves it out")
    )
    cap: int | None = field(
        default=None, metadata=spec(low=1, doc="dialogues of it in an epoch at most; the others come in the next ones")
    )
    min: int | None = field(default=None, metadata=spec(low=1, doc="frames.min of its videos"))
    max: int | None = field(default=None, metadata=spec(low=1, doc="frames.max of its videos"))

    def __post_init__(self) -> None:
        if not SAMPLING_PATTERN.fullmatch(self.sampling):
            raise ManifestError(f"sampling: {self.sampling!r} is not {SAMPLING_HELP}")

    def bound_frames(self, frames: FramesConfig) -> FramesConfig:
        """``frames`` within the bounds of the entry."""
        bounds = {name: getattr(self, name) for name in ("min", "max") if getattr(self, name) is not None}
        return dataclasses.replace(frames, **bounds)


@dataclass(frozen=True, kw_only=True)
class MixRootConfig:
    """One shard root of a mix; entries that it does not name are taken whole, as often as the root says."""

    root: str = field(metadata=spec(doc="folder or address of finished shards, such as shards/stage2"))
    repeat: float = field(default=1.0, metadata=spec(low=0, doc="how often an epoch has each dialogue"))
    weight: float | None = field(
        default=None, metadata=spec(low=0, doc="share of an epoch; every root has one, or none has")
    )
    entries: tuple[MixEntryConfig, ...] = ()

    def __post_init__(self) -> None:
        names = [entry.entry for entry in self.entries]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise ManifestError(f"entries[{number}].entry: {name} stands twice; give one entry its settings once")
        if not self.repeat and not any(entry.repeat for entry in self.entries):
            raise ManifestError("repeat: is 0, and no entry has its own; nothing would be read, leave the root out")
