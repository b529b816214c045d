"""The files of a built root with their digests, and the members of a shard."""

from __future__ import annotations

import hashlib

import webdataset


def members(root, folder):
    """Return every sample of a folder as {extension: bytes}, by key, read with webdataset."""
    shards = sorted(str(path) for path in (root / folder).glob("*.tar"))
    found = {}
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        assert sample["__key__"] not in found
        found[sample["__key__"]] = {name: data for name, data in sample.items() if not name.startswith("__")}
    return found


def snapshot(folder):
    """Return the digest of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
