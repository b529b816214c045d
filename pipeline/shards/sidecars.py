"""Small files beside the shards that other readers need: wids shard indexes and Megatron-Energon's metadata."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from framestream.pipeline.shards.writer import BLOCK, ShardInfo
from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.records import load_json

ENERGON_VERSION = "7.4.1"  #: Megatron-Energon release that defines the folder layout


def read_sidecars(folder: str | Path) -> list[ShardInfo]:
    """Return the shards that :func:`write_sidecars` described in ``folder``, sorted by name; ``sha256`` is empty.

    Raises:
        OSError, ValueError: a sidecar file is missing or damaged; one line with its name.
    """
    folder = Path(folder)
    shards: list[ShardInfo] = []
    for path in sorted(folder.glob("shardindex*.json")):
        try:
            parts = load_json(path.read_bytes())["shardlist"]
            found = [
                ShardInfo(part["url"], part["nsamples"], part["filesize"], "", part["md5sum"], ()) for part in parts
            ]
            if not all(_is_sound(info) for info in found):
                raise ValueError("a shard in it has no valid name, size or checksum")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: damaged list of shards ({' '.join(str(error).split())})") from None
        shards += [replace(info, sample_offsets=_read_offsets(folder / f"{info.name}.idx", info)) for info in found]
    return sorted(shards, key=lambda shard: shard.name)


def _is_sound(info: ShardInfo) -> bool:
    return (
        isinstance(info.name, str)
        and re.fullmatch(r"[a-z]+-[0-9]+\.tar", info.name) is not None
        and type(info.samples) is type(info.bytes) is int
        and isinstance(info.md5, str)
        and re.fullmatch("[0-9a-f]{32}", info.md5) is not None
    )


def _read_offsets(path: Path, info: ShardInfo) -> tuple[int, ...]:
    """Read the offsets of a shard's samples."""
    with open(path, "rb") as file:
        data = file.read(8 * info.samples + 9)
    offsets = np.frombuffer(data[: len(data) // 8 * 8], dtype="<u8")
    if len(data) != 8 * (info.samples + 1) or (np.diff(offsets.astype(np.float64)) <= 0).any() or offsets[0] != 0:
        raise ValueError(f"{path}: damaged list of offsets")
    if offsets[-1] >= info.bytes or (offsets % BLOCK).any():
        raise ValueError(f"{path}: damaged list of offsets")
    return tuple(offsets.tolist())


def scan_shard(path: str | Path) -> ShardInfo:
    """Read a shard from its first to its last byte, and return what its sidecars say about it.

    Raises:
        OSError, ValueError: it is missing, or not a tar of samples; one line.
    """
    path, hashes = Path(path), (hashlib.sha256(), hashlib.md5(usedforsecurity=False))
    offsets, last, end = [], None, 0
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                key = member.name.partition(".")[0]
                if key != last:
                    offsets.append(member.offset)
                last, end = key, member.offset_data + member.size + -member.size % BLOCK
    except tarfile.TarError as error:
        raise ValueError(f"not a shard ({error})") from None
    with open(path, "rb") as file:
        while data := file.read(1 << 20):
            for digest in hashes:
                digest.update(data)
    sha256, md5 = (digest.hexdigest() for digest in hashes)
    return ShardInfo(path.name, len(offsets), path.stat().st_size, sha256, md5, (*offsets, end))


def write_sidecars(folder: str | Path, shards: Sequence[ShardInfo]) -> None:
    """Write what Megatron-Energon and wids expect beside the shards of one folder (video, image or dialogue).

    ``shardindex.json`` (train) and ``shardindex-val.json`` are wids shard indexes. ``.nv-meta/`` and ``NAME.tar.idx``
    are Energon's. They contain only Energon's own keys, because its parsers refuse unknown ones.
    """
    folder = Path(folder)
    shards = sorted(shards, key=lambda shard: shard.name)
    for shard in shards:
        write_atomic(folder / f"{shard.name}.idx", np.array(shard.sample_offsets, dtype="<u8").tobytes())
    splits = {split: [shard for shard in shards if shard.split == split] for split in ("train", "val", "test")}
    for split, members in splits.items():
        if members:
            index = {
                "__kind__": "wids-shard-index-v1",
                "wids_version": 1,
                "name": f"{folder.name}-{split}",
                "shardlist": [
                    {"url": shard.name, "nsamples": shard.samples, "filesize": shard.bytes, "md5sum": shard.md5}
                    for shard in members
                ],
            }
            name = "shardindex.json" if split == "train" else f"shardindex-{split}.json"
            write_atomic(folder / name, (json.dumps(index, indent=1) + "\n").encode())

    meta = folder / ".nv-meta"
    meta.mkdir(parents=True, exist_ok=True)
    info = {"energon_version": ENERGON_VERSION, "shard_counts": {shard.name: shard.samples for shard in shards}}
    parts = {split: [shard.name for shard in members] for split, members in splits.items()}
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    write_atomic(meta / ".info.json", (json.dumps(info, indent=1) + "\n").encode())
    write_atomic(meta / "split.yaml", yaml.safe_dump({"exclude": [], "split_parts": parts}, sort_keys=False).encode())
    write_atomic(meta / "dataset.yaml", yaml.safe_dump(dataset, sort_keys=False).encode())
