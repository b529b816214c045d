"""Decode one sample as webdataset, wids, datasets or Megatron-Energon read it: from its members' bytes to frames.

Only the selected frames are decoded, by libjpeg-turbo.
"""

from __future__ import annotations

import hashlib
import math
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
from framestream.pipeline.utils.arguments import refuse_unknown_arguments
from framestream.pipeline.utils.records import load_json


@refuse_unknown_arguments
def read_members(members: Mapping[str, Any], frames: FrameChoice = None) -> Sample:
    """Decode a sample from its members.

    A dialogue has no media here. They are in the other two folders, under the keys that its JSON names.

    Args:
        members: by extension, ``mp4`` or ``jpg``, and ``json``; other names are ignored. Names may begin with a dot, as
            those of ``wids`` do. A value may be bytes, an open file, or what ``datasets`` returns undecoded. ``json``
            may also be text or an object.
        frames: as for :class:`framestream.pipeline.adapters.ShardDataset`; None for a root built with
            ``compat: published``.

    Raises:
        SampleError: the members are not those of a sample, or cannot be read.
    """
    validate_choice(frames)
    found = {name.lstrip("."): value for name, value in members.items()}
    key = found.get("__key__", "a sample")
    try:
        metadata = found["json"]
        if not isinstance(metadata, Mapping):
            metadata = load_json(metadata if isinstance(metadata, str) else _bytes(metadata))
        key = metadata["key"]
        if "conversations" in metadata:
            return Sample([], [_dialogue(metadata)])
        dialogues = [_dialogue(item) for item in load_json(metadata["dialogues"])]
        if metadata["kind"] == "image":
            jpeg = _bytes(found["jpg"])
            _check_digest(jpeg, metadata)
            return Sample([_media(decode_jpeg(jpeg)[None], np.zeros(1), metadata)], dialogues)
        return Sample([_video(_bytes(found["mp4"]), metadata, frames)], dialogues)
    except KeyError as error:
        raise SampleError(f"{key}: has no {error}; pass the members as the shard has them") from None
    except (OSError, TypeError, ValueError, OverflowError, IndexError, AttributeError, MemoryError) as error:
        raise SampleError(f"{key}: {' '.join(str(error).split())}") from None


def _video(mp4: bytes, metadata: Mapping[str, Any], choice: FrameChoice) -> Media:
    stored, seconds = np.array(metadata["frame_index"]), np.array(metadata["timestamps"], dtype=np.float64)
    vlen, fps, duration, key = (metadata[name] for name in ("vlen", "fps", "duration", "key"))
    if not all(math.isfinite(value) for value in (vlen, fps, duration)):
        raise ValueError("vlen, fps or duration in its json is not finite; restore the shard")
    indices = choose_stored_frames(choice, stored, vlen, fps, duration, media_seed(0, key))
    offsets, sizes, _ = mjpeg_frames(mp4)
    if len(offsets) != len(stored):
        raise ValueError(f"the mp4 has {len(offsets)} frames, the json {len(stored)}")
    _check_digest(mp4, metadata)
    height, width = metadata["height"], metadata["width"]
    out_width, out_height = shown_size(choice, width, height)
    out = np.empty((len(indices), out_height, out_width, 3), dtype=np.uint8)
    for k, index in enumerate(indices.tolist()):
        decode_into(mp4[offsets[index] : offsets[index] + sizes[index]], (height, width), out[k])
    return _media(out, seconds[indices], metadata)


def _check_digest(data: bytes, metadata: Mapping[str, Any]) -> None:
    if hashlib.sha256(data).hexdigest() != metadata["sha256"]:
        raise ValueError("damaged (its sha256 is not the one in the json); restore the shard")


def _media(frames: np.ndarray, timestamps: np.ndarray, metadata: Mapping[str, Any]) -> Media:
    fields = {name: metadata[name] for name in ("key", "kind", "start", "duration", "source")}
    return Media(torch.from_numpy(frames), torch.from_numpy(timestamps), **fields)


def _dialogue(item: Mapping[str, Any]) -> Dialogue:
    turns = item["conversations"]
    turns = load_json(turns) if isinstance(turns, str) else turns
    return Dialogue(turns, item["key"], item["id"], item["entry"])


def _bytes(value: Any) -> bytes:
    if isinstance(value, Mapping):  # an undecoded column of datasets
        value = value["bytes"]
    return value.read() if hasattr(value, "read") else bytes(value)
