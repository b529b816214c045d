"""What a shard root holds, as values for one HTML page: counts, histograms, what was left out, and a sample to look at.

Only the index, the ledger and a seeded sample of frames are read, so that the size of the shards does not matter. The
index is taken at its word; ``tools/verify_shards.py`` checks it.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from markupsafe import Markup
from PIL import Image

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.html.page import render_page
from framestream.pipeline.html.svg import Bin, format_duration, format_number, histogram, ticks
from framestream.pipeline.media.errors import MAX_PIXELS
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg, jpeg_size
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.ledger import REASONS, read_ledger

THUMBNAIL = 176  #: longer side of a frame on the page, in pixels
MAX_FRAME = 1 << 26  #: bytes of a JPEG that is read
DIALOGUES, TURNS, CHARACTERS = 3, 6, 600  #: shown of a media item, of a dialogue, of a turn
DISTINCT, LINEAR, SPAN = 12, 20, 100  #: values shown one by one; linear bins; max / min from which bins grow
VERIFY = "; run tools/verify_shards.py"
SMALLEST = 1e-9  #: of the largest value; what is smaller shares a bin


@dataclass(frozen=True, slots=True)
class UsageStats:
    """Which dialogue uses which media item: one entry for each use, in the order of the dialogues."""

    media: np.ndarray  #: int32 rows of the media table
    dialogue: np.ndarray  #: int32 rows of the dialogue table
    entry: np.ndarray  #: int32 number of the dialogue's entry
    media_count: np.ndarray  #: int32, of every dialogue


def inspection_page(root: Path, media: int, frames: int, seed: int) -> str:
    """The page about ``root`` as HTML.

    Args:
        media: media items on the contact sheets.
        frames: frames shown of each, at most.
        seed: decides which media are shown.

    Raises:
        ShardsError: no finished root is there.
    """
    index = Index.open(root)
    record = json.loads((root / "build.json").read_text(encoding="utf-8"))
    use = _uses(index)
    rng = np.random.default_rng(seed)
    values = {
        "root": root,
        "seed": seed,
        "facts": _facts(index),
        "entries": record.get("entries", []),
        "left_out": _left_out(root),
        "charts": _charts(index, use),
        "sheets": [_sheet(index, use, row, frames) for row in _sample_media(use, media, rng)],
        "texts": [_dialogue(index, row) for row in _sample_texts(use, media // 6, rng)],
        "dialogues": DIALOGUES,
    }
    try:
        return render_page(
            Path(__file__).parent / "inspection.html.j2", {"duration": format_duration, "size": _size}, **values
        )
    except (TypeError, jinja2.UndefinedError) as error:
        raise ShardsError(f"{root / 'build.json'}: its entries are not those of the format ({error}){VERIFY}") from None


def _uses(index: Index) -> UsageStats:
    parts: list[tuple[np.ndarray, ...]] = []
    counts, first = [], 0
    names = {name: number for number, name in enumerate(pc.unique(index.dialogues["entry"]).to_pylist())}
    values = pa.array(list(names), pa.string())
    for batch in index.dialogues.select(["entry", "media"]).to_batches():
        length = pc.list_value_length(batch["media"]).to_numpy(zero_copy_only=False).astype(np.int32)
        entry = pc.index_in(batch["entry"], values).to_numpy(zero_copy_only=False).astype(np.int32)
        rows = np.arange(first, first + len(batch), dtype=np.int32)
        parts.append((batch["media"].flatten().to_numpy(), np.repeat(rows, length), np.repeat(entry, length)))
        counts.append(length)
        first += len(batch)
    columns = [np.concatenate([np.empty(0, np.int32), *column]) for column in zip(*parts, strict=True)]
    if not columns:
        columns = [np.empty(0, np.int32)] * 3
    if len(columns[0]) and not 0 <= columns[0].min() <= columns[0].max() < len(index.media):
        raise ShardsError(f"{index.root}: dialogues.arrow names media that are not there{VERIFY}")
    return UsageStats(*columns, media_count=np.concatenate([np.empty(0, np.int32), *counts]))


# Counts ---------------------------------------------------------------------------------------------------------------


def _facts(index: Index) -> dict[str, Any]:
    """Totals of the root."""
    media, shards = index.media, index.shards
    video = pc.equal(media["kind"], "video")
    held_out = pc.sum(pc.equal(index.dialogues["split"], "val")).as_py() or 0
    return {
        "shards": len(shards),
        "bytes": pc.sum(shards["bytes"]).as_py() or 0,
        "videos": pc.sum(video).as_py() or 0,
        "stills": len(media) - (pc.sum(video).as_py() or 0),
        "seconds": pc.sum(media["duration"]).as_py() or 0.0,
        "frames": pc.sum(pc.list_value_length(media["timestamps"])).as_py() or 0,
        "train": len(index.dialogues) - held_out,
        "val": held_out,
        "folders": [
            (row["folder"], row["split"], row["name_count"], row["samples_sum"], row["bytes_sum"])
            for row in shards.group_by(["folder", "split"], use_threads=False)
            .aggregate([("name", "count"), ("samples", "sum"), ("bytes", "sum")])
            .to_pylist()
        ],
    }


def _left_out(root: Path) -> list[dict[str, Any]]:
    """Rows of the ledger by kind and reason, the most first, each with one of its messages."""
    ledger = read_ledger(root)
    groups = ledger.group_by(["kind", "reason"]).aggregate([([], "count_all"), ("message", "min")]).to_pylist()
    return [
        {**group, "meaning": REASONS.get(group["reason"], "")}
        for group in sorted(groups, key=lambda group: (-group["count_all"], group["kind"], group["reason"]))
    ]


# Histograms -----------------------------------------------------------------------------------------------------------


def _charts(index: Index, use: UsageStats) -> list[tuple[Markup, str]]:
    """Histograms, each with a line of figures that says the same in words."""
    media = index.media
    video = pc.equal(media["kind"], "video").to_numpy()
    stored = pc.list_value_length(media["timestamps"]).to_numpy()
    size = media["size"].to_numpy()
    tokens, source = _tokens(index, use, video)
    measured = [
        ("videos by duration, seconds", media["duration"].to_numpy()[video], ""),
        ("videos by stored frames", stored[video], ""),
        ("videos by bytes", size[video], ""),
        ("stills by bytes", size[~video], ""),
        ("dialogues by tokens", tokens, source),
        ("dialogues by media", use.media_count, ""),
    ]
    charts = []
    for title, values, note in measured:
        if len(values):
            low, middle, high, last = np.percentile(values, [0, 50, 95, 100])
            figures = f"{len(values):,}: least {format_number(low)}, median {format_number(middle)}, 95 % up to {format_number(high)}"
            charts.append((histogram(title, bins(values)), f"{figures}, most {format_number(last)}. {note}".strip()))
    return charts


def _tokens(index: Index, use: UsageStats, video: np.ndarray) -> tuple[np.ndarray, str]:
    """Tokens of each dialogue and where the numbers are from: the newest token cache, or visual tokens alone."""
    for path in sorted((index.root / "index").glob("tokens-*.arrow"), key=os.path.getmtime, reverse=True):
        try:
            with pa.memory_map(str(path)) as source:
                table = pa.ipc.open_file(source).read_all()
            if len(table) == len(index.dialogues):
                refused = int(pc.sum(pc.not_equal(table["error"], "")).as_py() or 0)
                note = f"Text and visual tokens, from {path.name}; {refused:,} dialogues cannot be used."
                return table["length"].to_numpy(), note
        except (OSError, KeyError, pa.ArrowException):
            continue  # the loader makes it again
    sampled = pc.list_value_length(index.media["sample"]).to_numpy()
    clips = sampled // index.specification.get("frames", {}).get("clip_frames", 4)
    visual = np.where(video, clips * TOKENS_PER_CLIP, TOKENS_PER_TILE)
    counts = np.bincount(use.dialogue, weights=visual[use.media], minlength=len(index.dialogues))
    return counts, "Visual tokens alone, a still counted as one tile: there is no token cache yet."


def bins(values: np.ndarray) -> list[Bin]:
    """Bins of (n,) numbers that are at least 0: single values if few, else even ones, or growing by 1, 2, 5, 10."""
    distinct, counts = np.unique(values, return_counts=True)
    few = len(distinct) <= min(DISTINCT, max(1, len(values) // 2))
    if few and (distinct == np.floor(distinct)).all():
        return [Bin(float(value), float(value), int(count)) for value, count in zip(distinct, counts, strict=True)]
    low, high = float(distinct[0]), float(distinct[-1])
    least = max(float(distinct[distinct > 0][0]), high * SMALLEST)
    if high / least > SPAN:
        powers = range(int(np.floor(np.log10(least))), int(np.ceil(np.log10(high))) + 1)
        edges = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        edges = [edge for edge, after in zip(edges, [*edges[1:], np.inf], strict=True) if after > least]
        edges = [0.0] * (low < edges[0]) + edges[: int(np.searchsorted(edges, high, "right")) + 1]
    else:
        edges = ticks(low, high, LINEAR)
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # ticks are rounded
    counts, _ = np.histogram(values, edges)
    return [Bin(*edge, int(count)) for edge, count in zip(zip(edges, edges[1:], strict=False), counts, strict=True)]


# The sample -----------------------------------------------------------------------------------------------------------


def _sample_media(use: UsageStats, count: int, rng: np.random.Generator) -> list[int]:
    """Rows of media, taken from the entries in turn, so that small ones are seen too."""
    order = rng.permutation(len(use.media))
    order = order[np.argsort(use.entry[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(use.entry[order])) + 1) if len(order) else []
    groups = [groups[number] for number in rng.permutation(len(groups))]
    chosen: dict[int, None] = {}
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            if turn < len(group):
                chosen.setdefault(int(use.media[group[turn]]))
            if len(chosen) == count:
                return list(chosen)
    return list(chosen)


def _sample_texts(use: UsageStats, count: int, rng: np.random.Generator) -> list[int]:
    """Rows of dialogues without media."""
    rows = np.flatnonzero(use.media_count == 0)
    return rng.permutation(rows)[:count].tolist()


def _sheet(index: Index, use: UsageStats, row: int, frames: int) -> dict[str, Any]:
    """One media item of the sample: facts, frames and dialogues."""
    item = index.media.slice(row, 1).to_pylist()[0]
    places = np.unique(np.linspace(0, len(item["timestamps"]) - 1, frames).round().astype(int)).tolist()
    about = np.unique(use.dialogue[use.media == row])
    return {
        "item": item,
        "shard": index.path_of(item["shard"]).relative_to(index.root),
        "frames": [(item["timestamps"][place], _thumbnail(index, item, place)) for place in places],
        "dialogues": [_dialogue(index, int(number)) for number in about[:DIALOGUES]],
        "count": len(about),
    }


def _thumbnail(index: Index, item: Mapping[str, Any], place: int) -> str:
    """A stored frame as a small JPEG in base64; empty if it cannot be read."""
    offset, size, wanted = item["frame_offset"][place], item["frame_size"][place], (item["width"], item["height"])
    try:
        with open(index.path_of(item["shard"]), "rb") as file:
            file.seek(offset)
            data = file.read(size) if 0 < size <= MAX_FRAME else b""
        if jpeg_size(data) != wanted or wanted[0] * wanted[1] > MAX_PIXELS:
            return ""
        picture = Image.fromarray(decode_jpeg(data))
    except (OSError, ValueError):
        return ""
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return base64.b64encode(encode_jpeg(np.asarray(picture), 80, "420")).decode("ascii")


def _dialogue(index: Index, row: int) -> dict[str, Any]:
    """A dialogue, shortened."""
    item = index.dialogues.slice(row, 1).to_pylist()[0]
    try:
        turns = [(turn["from"], _short(turn["value"], CHARACTERS)) for turn in json.loads(item["conversations"])]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ShardsError(
            f"{index.root}: dialogues.arrow: {item['key']}: conversations of another form{VERIFY}"
        ) from None
    return {
        "id": _short(item["id"], 80),
        "entry": item["entry"],
        "split": item["split"],
        "media": len(item["media"]),
        "turns": turns[:TURNS],
        "more": max(len(turns) - TURNS, 0),
    }


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … ({len(text):,} characters)"


def _size(count: float) -> str:
    """A number of bytes in few characters."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"
