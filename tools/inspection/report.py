"""HTML report about a shard root: counts, histograms, what was left out, and a sample of media with dialogues.

Only the index, the ledger and a seeded sample of frames are read, so the size of the shards does not matter. The index
is not checked here: ``tools/verify_shards.py`` does that.
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
from framestream.pipeline.tokenization.token_files import open_tokens
from framestream.tools.common.text_table import format_bytes

THUMBNAIL = 176  #: longer side of a frame on the page, in pixels
MAX_FRAME = 1 << 26  #: bytes of a JPEG that is read
DIALOGUES, TURNS, CHARACTERS = (
    3,
    6,
    600,
)  #: most to show: dialogues of a media item, turns of a dialogue, characters of a turn
DISTINCT, LINEAR, SPAN = (
    12,
    20,
    100,
)  #: most values with a bin each; number of linear bins; max / min above which bins grow
VERIFY = "; run tools/verify_shards.py"
SMALLEST = 1e-9  #: of the largest value; smaller values share one bin


@dataclass(frozen=True, slots=True)
class UsageStats:
    """Which dialogue uses which media item: one element for each use, in the order of the dialogues."""

    media: np.ndarray  #: int32 rows of the media table
    dialogue: np.ndarray  #: int32 rows of the dialogue table
    entry: np.ndarray  #: int32 number of the dialogue's entry
    media_count: np.ndarray  #: int32, of every dialogue


def inspection_page(root: Path, media: int, frames: int, seed: int) -> str:
    """Render the report about ``root`` as HTML.

    Args:
        media: media items on the contact sheets.
        frames: most frames to show of each.
        seed: seed of the sample.

    Raises:
        ShardsError: ``root`` is not a finished build.
    """
    index = Index.open(root)
    record = json.loads((root / "build.json").read_text(encoding="utf-8"))
    usage = _usage_stats(index)
    rng = np.random.default_rng(seed)
    values = {
        "root": root,
        "seed": seed,
        "facts": _totals(index),
        "entries": record.get("entries", []),
        "left_out": _left_out(root),
        "charts": _charts(index, usage),
        "sheets": [_contact_sheet(index, usage, row, frames) for row in _sample_media(usage, media, rng)],
        "texts": [_dialogue(index, row) for row in _sample_texts(usage, media // 6, rng)],
        "dialogues": DIALOGUES,
    }
    try:
        return render_page(
            Path(__file__).parent / "inspection.html.j2", {"duration": format_duration, "size": format_bytes}, **values
        )
    except (TypeError, jinja2.UndefinedError) as error:
        raise ShardsError(f"{root / 'build.json'}: its entries are not in the format ({error}){VERIFY}") from None


def _usage_stats(index: Index) -> UsageStats:
    empty = np.empty(0, np.int32)
    media, dialogue, entry, counts = [empty], [empty], [empty], [empty]
    entries = pc.unique(index.dialogues["entry"])
    first = 0
    for batch in index.dialogues.select(["entry", "media"]).to_batches():
        count = pc.list_value_length(batch["media"]).to_numpy(zero_copy_only=False).astype(np.int32)
        number = pc.index_in(batch["entry"], entries).to_numpy(zero_copy_only=False).astype(np.int32)
        rows = np.arange(first, first + len(batch), dtype=np.int32)
        media.append(batch["media"].flatten().to_numpy())
        dialogue.append(np.repeat(rows, count))
        entry.append(np.repeat(number, count))
        counts.append(count)
        first += len(batch)
    usage = UsageStats(*map(np.concatenate, (media, dialogue, entry, counts)))
    if len(usage.media) and not 0 <= usage.media.min() <= usage.media.max() < len(index.media):
        raise ShardsError(f"{index.root}: dialogues.arrow names media that do not exist{VERIFY}")
    return usage


# Counts ---------------------------------------------------------------------------------------------------------------


def _totals(index: Index) -> dict[str, Any]:
    """Return the totals of the root."""
    media, shards = index.media, index.shards
    video = pc.equal(media["kind"], "video")
    held_out = pc.sum(pc.equal(index.dialogues["split"], "val")).as_py() or 0
    return {
        "shards": len(shards),
        "bytes": pc.sum(shards["bytes"]).as_py() or 0,
        "videos": pc.sum(video).as_py() or 0,
        "images": len(media) - (pc.sum(video).as_py() or 0),
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
    """Count the ledger rows by kind and reason, most frequent first, each with one of its messages."""
    ledger = read_ledger(root)
    groups = ledger.group_by(["kind", "reason"]).aggregate([([], "count_all"), ("message", "min")]).to_pylist()
    return [
        {**group, "meaning": REASONS.get(group["reason"], "")}
        for group in sorted(groups, key=lambda group: (-group["count_all"], group["kind"], group["reason"]))
    ]


# Histograms -----------------------------------------------------------------------------------------------------------


def _charts(index: Index, usage: UsageStats) -> list[tuple[Markup, str]]:
    """Draw the histograms, each with a line of key figures."""
    media = index.media
    video = pc.equal(media["kind"], "video").to_numpy()
    stored = pc.list_value_length(media["timestamps"]).to_numpy()
    size = media["size"].to_numpy()
    tokens, note = _tokens(index, usage, video)
    distributions = [
        ("videos by duration, seconds", media["duration"].to_numpy()[video], ""),
        ("videos by stored frames", stored[video], ""),
        ("videos by bytes", size[video], ""),
        ("images by bytes", size[~video], ""),
        ("dialogues by tokens", tokens, note),
        ("dialogues by media", usage.media_count, ""),
    ]
    charts = []
    for title, values, comment in distributions:
        if len(values):
            low, middle, high, last = map(format_number, np.percentile(values, [0, 50, 95, 100]))
            figures = f"{len(values):,}: min {low}, median {middle}, 95 % up to {high}, max {last}."
            charts.append((histogram(title, bins(values)), f"{figures} {comment}".strip()))
    return charts


def _tokens(index: Index, usage: UsageStats, video: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the tokens of each dialogue, and a note on their source: the newest token cache, or visual tokens only."""
    paths = [path for folder in index.storage.derived_folders for path in folder.glob("tokens-*.arrow")]
    for path in sorted(paths, key=os.path.getmtime, reverse=True):
        try:
            table = open_tokens(path, len(index.dialogues)).table
        except (OSError, ValueError):
            continue  # the loader replaces it
        unusable = int(pc.sum(pc.not_equal(table["error"], "")).as_py() or 0)
        note = f"Text and visual tokens, from {path.name}; {unusable:,} dialogues cannot be used."
        return table["length"].to_numpy(), note
    sampled = pc.list_value_length(index.media["sample"]).to_numpy()
    clips = sampled // index.specification.get("frames", {}).get("clip_frames", 4)
    visual = np.where(video, clips * TOKENS_PER_CLIP, TOKENS_PER_TILE)
    counts = np.bincount(usage.dialogue, weights=visual[usage.media], minlength=len(index.dialogues))
    return counts, "Visual tokens only, one tile for each image: there is no token cache yet."


def bins(values: np.ndarray) -> list[Bin]:
    """Return bins of (n,) numbers of at least 0.

    A few distinct values have a bin each. Others are in bins of equal width or, over a wide range, at 1, 2, 5, 10 ...
    """
    distinct, counts = np.unique(values, return_counts=True)
    few = len(distinct) <= min(DISTINCT, max(1, len(values) // 2))
    if few and (distinct == np.floor(distinct)).all():
        return [Bin(float(value), float(value), int(count)) for value, count in zip(distinct, counts, strict=True)]
    low, high = float(distinct[0]), float(distinct[-1])
    smallest = max(float(distinct[distinct > 0][0]), high * SMALLEST)
    if high / smallest > SPAN:
        powers = range(int(np.floor(np.log10(smallest))), int(np.ceil(np.log10(high))) + 1)
        edges = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        edges = [edge for edge, after in zip(edges, [*edges[1:], np.inf], strict=True) if after > smallest]
        edges = [0.0] * (low < edges[0]) + edges[: int(np.searchsorted(edges, high, "right")) + 1]
    else:
        edges = ticks(low, high, LINEAR)
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)  # ticks are rounded
    counts, _ = np.histogram(values, edges)
    return [Bin(*edge, int(count)) for edge, count in zip(zip(edges, edges[1:], strict=False), counts, strict=True)]


# Sample ---------------------------------------------------------------------------------------------------------------


def _sample_media(usage: UsageStats, count: int, rng: np.random.Generator) -> list[int]:
    """Draw rows of media, from the entries in turn, so that small entries are included."""
    order = rng.permutation(len(usage.media))
    order = order[np.argsort(usage.entry[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(usage.entry[order])) + 1) if len(order) else []
    groups = [groups[number] for number in rng.permutation(len(groups))]
    chosen: dict[int, None] = {}
    for turn in range(max(map(len, groups), default=0)):
        for group in groups:
            if turn < len(group):
                chosen.setdefault(int(usage.media[group[turn]]))
            if len(chosen) == count:
                return list(chosen)
    return list(chosen)


def _sample_texts(usage: UsageStats, count: int, rng: np.random.Generator) -> list[int]:
    """Draw rows of dialogues without media."""
    rows = np.flatnonzero(usage.media_count == 0)
    return rng.permutation(rows)[:count].tolist()


def _contact_sheet(index: Index, usage: UsageStats, row: int, frames: int) -> dict[str, Any]:
    """Return one media item of the sample, with its frames and dialogues."""
    item = index.media.slice(row, 1).to_pylist()[0]
    shown = np.unique(np.linspace(0, len(item["timestamps"]) - 1, frames).round().astype(int)).tolist()
    dialogues = np.unique(usage.dialogue[usage.media == row])
    return {
        "item": item,
        "shard": Path(index.shard_path(item["shard"])).relative_to(index.root),
        "frames": [(item["timestamps"][frame], _thumbnail(index, item, frame)) for frame in shown],
        "dialogues": [_dialogue(index, int(number)) for number in dialogues[:DIALOGUES]],
        "count": len(dialogues),
    }


def _thumbnail(index: Index, item: Mapping[str, Any], frame: int) -> str:
    """Return a stored frame as a small JPEG in base64; empty if it cannot be read."""
    offset, size, dimensions = item["frame_offset"][frame], item["frame_size"][frame], (item["width"], item["height"])
    try:
        with open(index.shard_path(item["shard"]), "rb") as file:
            file.seek(offset)
            data = file.read(size) if 0 < size <= MAX_FRAME else b""
        if jpeg_size(data) != dimensions or dimensions[0] * dimensions[1] > MAX_PIXELS:
            return ""
        image = Image.fromarray(decode_jpeg(data))
    except (OSError, ValueError):
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    return base64.b64encode(encode_jpeg(np.asarray(image), 80, "420")).decode("ascii")


def _dialogue(index: Index, row: int) -> dict[str, Any]:
    """Return a dialogue for the page, shortened."""
    item = index.dialogues.slice(row, 1).to_pylist()[0]
    try:
        turns = [(turn["from"], _shorten(turn["value"], CHARACTERS)) for turn in json.loads(item["conversations"])]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ShardsError(
            f"{index.root}: dialogues.arrow: {item['key']}: its conversations are not in the format{VERIFY}"
        ) from None
    return {
        "id": _shorten(item["id"], 80),
        "entry": item["entry"],
        "split": item["split"],
        "media": len(item["media"]),
        "turns": turns[:TURNS],
        "more": max(len(turns) - TURNS, 0),
    }


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} … ({len(text):,} characters)"
