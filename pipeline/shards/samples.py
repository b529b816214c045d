"""Keys and JSON members of the samples in shards.

The layout of a shard is in :mod:`framestream.pipeline.shards`, all fields are in docs/format.md. The same input gives
the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from framestream.pipeline.utils.canonical_json import canonical_json


def media_key(kind: str, identity: str) -> str:
    """Return the key of a media item: ``v`` (video) or ``i`` (image), and 24 hex digits of the identity's sha256.

    Args:
        kind: video or image.
        identity: text that identifies the item, such as its source and clip; not its bytes.
    """
    return {"video": "v", "image": "i"}[kind] + hashlib.sha256(identity.encode()).hexdigest()[:24]


def dialogue_key(identity: str) -> str:
    """Return the key of a dialogue: ``d`` and 24 hex digits of the identity's sha256."""
    return "d" + hashlib.sha256(identity.encode()).hexdigest()[:24]


def media_metadata(
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
    """Return the ``json`` member of a media sample. Every sample has the same fields and types.

    Args:
        key: of the sample.
        kind: video or image.
        source: root and path of the source file.
        start: seconds of the source at which the clip begins.
        width: of the stored frames, in pixels.
        height: of the stored frames, in pixels.
        source_width: of the source, upright, in pixels.
        source_height: of the source, upright, in pixels.
        vlen: number of source frames of the clip; 1 for an image.
        fps: source frames a second; 0 for an image.
        duration: seconds of the clip; 0 for an image.
        salvaged: the source is damaged, and only the frames before the damage are stored.
        sample: the sampler's list, as indices into the stored frames.
        frame_index: source frame number of each stored frame, counted from the clip's first.
        timestamps: seconds of the source of each stored frame.
        sha256: hex digest of the media member.
        dialogues: known dialogues about this item alone; they become JSON text.
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
        "sample": [int(index) for index in sample],
        "frame_index": [int(frame) for frame in frame_index],
        "timestamps": [float(second) for second in timestamps],
        "sha256": str(sha256),
        "dialogues": canonical_json([dict(dialogue) for dialogue in dialogues]),
    }
    return canonical_json(value).encode()


def dialogue_metadata(
    *,
    key: str,
    id: str,
    entry: str,
    split: str,
    media: Sequence[str],
    conversations: Sequence[Mapping[str, str]],
    meta: Mapping[str, Any],
) -> bytes:
    """Return the ``json`` member of a dialogue.

    ``media``, ``conversations`` and ``meta`` become JSON text, because readers that infer a schema cannot join an empty
    list with a list of strings.

    Args:
        key: of the sample.
        id: as the annotation says.
        entry: name of the manifest's entry.
        split: train or val.
        media: media keys in order of use.
        conversations: turns with ``from`` and ``value``.
        meta: the annotation's other fields.
    """
    value = {
        "key": str(key),
        "id": str(id),
        "entry": str(entry),
        "split": str(split),
        "media": canonical_json([str(item) for item in media]),
        "conversations": canonical_json([{"from": turn["from"], "value": turn["value"]} for turn in conversations]),
        "meta": canonical_json(dict(meta)),
    }
    return canonical_json(value).encode()
