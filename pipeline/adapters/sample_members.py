"""One sample as webdataset, wids, datasets or Megatron-Energon read it: its members' bytes to frames.

Only the frames that are shown are decoded, by libjpeg-turbo.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from framestream.pipeline.adapters.frame_selection import FrameChoice, choose_stored_frames, shown_size, validate_choice
from framestream.pipeline.adapters.types import Dialogue, Media, Sample, SampleError
from framestream.pipeline.media.jpeg import decode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames
from framestream.pipeline.media.sampling import media_seed
from framestream.pipeline.shards.frame_reader import decode_into


def read_members(members: Mapping[str, Any], frames: FrameChoice = None) -> Sample:
    """The sample whose members a reader gave by extension (``mp4`` or ``jpg``, and ``json``; other names are ignored).

    A member may be bytes, an open file, or what ``datasets`` gives undecoded; ``json`` may be text, or parsed already.
    A dialogue has no media here: they are in the other two folders, under the keys that its JSON names.

    Args:
        members: such as a sample of ``webdataset``; names may begin with a dot, as those of ``wids`` do.
        frames: as for :class:`framestream.pipeline.adapters.ShardDataset`; None for a root built with ``compat: published``.

    Raises:
        SampleError: the members are not those of a sample, or cannot be read.
    """
    validate_choice(frames)
    found = {name.lstrip("."): value for name, value in members.items()}
    key = found.get("__key__", "a sample")
    try:
        facts = found["json"]
        if not isinstance(facts, Mapping):
            facts = json.loads(facts if isinstance(facts, str) else _bytes(facts))
        key = facts["key"]
        if "conversations" in facts:
            return Sample([], [_dialogue(facts)])
        dialogues = [_dialogue(item) for item in json.loads(facts["dialogues"])]
        if facts["kind"] == "image":
            return Sample([_medium(decode_jpeg(_bytes(found["jpg"]))[None], np.zeros(1), facts)], dialogues)
        return Sample([_video(_bytes(found["mp4"]), facts, frames)], dialogues)
    except KeyError as error:
        raise SampleError(f"{key}: has no {error}; give the members as its shard has them") from None
    except (OSError, TypeError, ValueError) as error:
        raise SampleError(f"{key}: {' '.join(str(error).split())}") from None


def _video(mp4: bytes, facts: Mapping[str, Any], choice: FrameChoice) -> Media:
    stored, seconds = np.array(facts["frame_index"]), np.array(facts["timestamps"], dtype=np.float64)
    places = choose_stored_frames(
        choice, stored, facts["vlen"], facts["fps"], facts["duration"], media_seed(0, facts["key"])
    )
    offsets, sizes, _ = mjpeg_frames(mp4)
    if len(offsets) != len(stored):
        raise ValueError(f"the mp4 has {len(offsets)} frames, the json {len(stored)}")
    size = facts["height"], facts["width"]
    out = np.empty((len(places), *shown_size(choice, *size[::-1])[::-1], 3), dtype=np.uint8)
    for k, place in enumerate(places.tolist()):
        decode_into(mp4[offsets[place] : offsets[place] + sizes[place]], size, out[k])
    return _medium(out, seconds[places], facts)


def _medium(frames: np.ndarray, timestamps: np.ndarray, facts: Mapping[str, Any]) -> Media:
    named = {name: facts[name] for name in ("key", "kind", "start", "duration", "source")}
    return Media(torch.from_numpy(frames), torch.from_numpy(timestamps), **named)


def _dialogue(item: Mapping[str, Any]) -> Dialogue:
    turns = item["conversations"]
    turns = json.loads(turns) if isinstance(turns, str) else turns
    return Dialogue(turns, item["key"], item["id"], item["entry"])


def _bytes(value: Any) -> bytes:
    if isinstance(value, Mapping):  # of datasets
        value = value["bytes"]
    return value.read() if hasattr(value, "read") else bytes(value)
