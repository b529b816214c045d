"""Small files beside the shards that other readers need: wids shard indexes and Megatron-Energon's metadata."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import yaml

from framestream.pipeline.shards.writer import ShardInfo
from framestream.pipeline.utils.atomic_io import write_atomic

ENERGON_VERSION = "7.4.1"  #: Megatron-Energon release that defines the folder layout


def read_sidecars(folder: str | Path) -> list[ShardInfo]:
    """Return the shards that :func:`write_sidecars` described in ``folder``, sorted by name; ``sha256`` is empty.

    Raises:
        OSError, ValueError, KeyError: a sidecar file is missing or damaged.
    """
    folder = Path(folder)
    shards: list[ShardInfo] = []
    for path in folder.glob("shardindex*.json"):
        for part in json.loads(path.read_bytes())["shardlist"]:
            offsets = np.frombuffer((folder / f"{part['url']}.idx").read_bytes(), dtype="<u8")
            numbers = (part["nsamples"], part["filesize"], "", part["md5sum"])
            shards.append(ShardInfo(part["url"], *numbers, tuple(offsets.tolist())))
    return sorted(shards, key=lambda shard: shard.name)


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
