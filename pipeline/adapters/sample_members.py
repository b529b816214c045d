"""Decode one sample as webdataset, wids, datasets or Megatron-Energon read it: from its members' bytes to frames.

Only the selected frames are decoded, by libjpeg-turbo. A dialogue about media is refused, because its media are samples
of other folders: a loop that passed it on would train on text about videos that nobody sees.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

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

Result = TypeVar("Result")


@refuse_unknown_arguments
def read_members(members: Mapping[str, Any], frames: FrameChoice = None) -> Sample:
    """Decode a media item with the dialogues about it alone, or a dialogue without media, from its members.

    Args:
        members: by extension, ``mp4`` or ``jpg``, and ``json``; other names are ignored. Names may begin with a dot, as
            those of ``wids`` do. A value may be bytes, an open file, or what ``datasets`` returns undecoded. ``json``
            may also be text or an object.
        frames: as for :class:`framestream.pipeline.adapters.ShardDataset`; None for a root built with
            ``compat: published``.

    Raises:
        SampleError: the members are not those of a sample, or cannot be read; or they are those of a dialogue about
            media, which are samples of the folders ``video`` and ``image``.
    """
    validate_choice(frames)
    return _decode(members, lambda found, metadata: _sample(found, metadata, frames, 0))


def read_dialogue(members: Mapping[str, Any]) -> tuple[Dialogue, list[str]]:
    """Return the dialogue of a sample of the folder ``dialogue``, and the keys of its media in order of use.

    Args:
        members: as for :func:`read_members`.

    Raises:
        SampleError: the members are not those of a dialogue, or cannot be read.
    """
    return _decode(members, lambda found, metadata: (_dialogue(metadata), load_json(metadata["media"])))


def read_media(members: Mapping[str, Any], frames: FrameChoice, seed: int) -> Media:
    """Return the media item of a sample of the folders ``video`` and ``image``.

    Args:
        members: as for :func:`read_members`.
        frames: as for :func:`read_members`.
        seed: of the build, for the sampler ``rand``.

    Raises:
        SampleError: the members are not those of a media item, or cannot be read.
    """
    return _decode(members, lambda found, metadata: _media_item(found, metadata, frames, seed))


def _decode(members: Mapping[str, Any], convert: Callable[[Mapping[str, Any], Mapping[str, Any]], Result]) -> Result:
    """Return ``convert(members without leading dots, their json)``; its errors become one line with the key."""
    found = {name.lstrip("."): value for name, value in members.items()}
    key = found.get("__key__", "a sample")
    try:
        metadata = found["json"]
        if not isinstance(metadata, Mapping):
            metadata = load_json(metadata if isinstance(metadata, str) else _bytes(metadata))
        key = metadata["key"]
        return convert(found, metadata)
    except KeyError as error:
        raise SampleError(f"{key}: has no {error}; pass the members as the shard has them") from None
    except (OSError, TypeError, ValueError, OverflowError, IndexError, AttributeError, MemoryError) as error:
        raise SampleError(f"{key}: {' '.join(str(error).split())}") from None


def _sample(found: Mapping[str, Any], metadata: Mapping[str, Any], frames: FrameChoice, seed: int) -> Sample:
    if "conversations" in metadata:
        if media := load_json(metadata["media"]):
            raise ValueError(
                f"is about {len(media)} media, which are samples of the folders video and image; "
                f"use stream_members(root) or ShardDataset(root), which join them"
            )
        return Sample([], [_dialogue(metadata)])
    dialogues = [_dialogue(item) for item in load_json(metadata["dialogues"])]
    return Sample([_media_item(found, metadata, frames, seed)], dialogues)


def _media_item(found: Mapping[str, Any], metadata: Mapping[str, Any], frames: FrameChoice, seed: int) -> Media:
    if metadata["kind"] == "image":
        jpeg = _bytes(found["jpg"])
        _check_digest(jpeg, metadata)
        return _media(decode_jpeg(jpeg)[None], np.zeros(1), metadata)
    return _video(_bytes(found["mp4"]), metadata, frames, seed)


def _video(mp4: bytes, metadata: Mapping[str, Any], choice: FrameChoice, seed: int) -> Media:
    stored, seconds = np.array(metadata["frame_index"]), np.array(metadata["timestamps"], dtype=np.float64)
    vlen, fps, duration, key = (metadata[name] for name in ("vlen", "fps", "duration", "key"))
    if not all(math.isfinite(value) for value in (vlen, fps, duration)):
        raise ValueError("vlen, fps or duration in its json is not finite; restore the shard")
    indices = choose_stored_frames(choice, stored, vlen, fps, duration, media_seed(seed, key))
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
