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

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from framestream.pipeline.utils.canonical_json import canonical_json

# Keys and JSON members ------------------------------------------------------------------------------------------------


def media_key(kind: str, identity: str) -> str:
    """Key of a media item (``kind`` video or image): its letter and 24 hex digits of the identity's sha256."""
    return {"video": "v", "image": "i"}[kind] + hashlib.sha256(identity.encode()).hexdigest()[:24]


def dialogue_key(identity: str) -> str:
    """Key of a dialogue: ``d`` and 24 hex digits of the identity's sha256."""
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
    """The ``json`` member of a dialogue; ``media`` (keys in order of use), ``conversations``, ``meta`` as JSON text.

    Text, because readers that infer a schema cannot join an empty list with a list of strings.
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


# Frames ---------------------------------------------------------------------------------------------------------------


# Shards ---------------------------------------------------------------------------------------------------------------
