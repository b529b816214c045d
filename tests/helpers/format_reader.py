"""A reader of shard roots that uses docs/format.md alone: it imports nothing of the project."""

from __future__ import annotations

import hashlib
import json
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

MEMBERS = {"video": ["mp4", "json"], "image": ["jpg", "json"], "dialogue": ["json"]}


class Reader:
    """All contents of a root, by row numbers of its index."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.build = json.loads((root / "build.json").read_text(encoding="utf-8"))
        self.media, self.dialogues, self.shards = (
            pa.ipc.open_file(pa.memory_map(str(root / "index" / f"{name}.arrow"))).read_all()
            for name in ("media", "dialogues", "shards")
        )
        self._tars: dict[int, mmap.mmap] = {}

    def fingerprint(self) -> str:
        """Return the expected index_fingerprint."""
        files = [(self.root / "index" / f"{name}.arrow").read_bytes() for name in ("media", "dialogues", "shards")]
        return hashlib.sha256(b"".join(hashlib.sha256(data).digest() for data in files)).hexdigest()

    def tar(self, shard: int) -> mmap.mmap:
        """Return the bytes of a shard."""
        if shard not in self._tars:
            path = self.root / self.shards["folder"][shard].as_py() / self.shards["name"][shard].as_py()
            with open(path, "rb") as file:
                self._tars[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._tars[shard]

    def frames(self, row: int) -> list[bytes]:
        """Return the stored frames of a media item as JPEGs."""
        item = self.media.slice(row, 1).to_pylist()[0]
        tar = self.tar(item["shard"])
        places = zip(item["frame_offset"], item["frame_size"], strict=True)
        return [tar[offset : offset + size] for offset, size in places]

    def facts(self, row: int) -> dict[str, Any]:
        """Return the JSON member of a media item."""
        item = self.media.slice(row, 1).to_pylist()[0]
        tar, header = self.tar(item["shard"]), _up(item["offset"] + item["size"], 512)
        assert tar[header : header + 25].decode("ascii") == item["key"]
        return json.loads(tar[header + 512 : header + 512 + int(tar[header + 124 : header + 135], 8)])

    def nearest(self, row: int, number: int) -> int:
        """Return the index of the stored frame that represents source frame ``number``."""
        stored = self.media["frame_index"][row].as_py()
        return min(range(len(stored)), key=lambda place: (abs(stored[place] - number), place))

    def spoken(self, row: int) -> list[tuple[str, list[str | int]]]:
        """Return the turns of a dialogue: the speaker, and texts with the rows of the media between them."""
        media, turns = iter(self.dialogues["media"][row].as_py()), []
        for turn in json.loads(self.dialogues["conversations"][row].as_py()):
            first, *rest = turn["value"].split("<image>")
            turns.append((turn["from"], [first, *(part for text in rest for part in (next(media), text))]))
        assert next(media, None) is None
        return turns

    def rows(self, shard: int) -> range:
        """Return the rows of ``media`` or ``dialogues`` that are the samples of a shard, in shard order."""
        dialogue = self.shards["folder"][shard].as_py() == "dialogue"
        before = [row for row in self.shards.to_pylist()[:shard] if (row["folder"] == "dialogue") == dialogue]
        first = sum(row["samples"] for row in before)
        return range(first, first + self.shards["samples"][shard].as_py())

    def samples(self, shard: int) -> Iterator[tuple[str, int, dict[str, tuple[int, bytes]]]]:
        """Yield key, byte offset of the first header, and members (offset, data) of each sample, from the tar alone."""
        tar, place = self.tar(shard), 0
        extensions = MEMBERS[self.shards["folder"][shard].as_py()]
        while any(tar[place : place + 512]):
            start, members, keys = place, {}, set()
            for extension in extensions:
                name = tar[place : place + 100].rstrip(b"\0").decode("ascii")
                size = int(tar[place + 124 : place + 135], 8)
                assert tar[place : place + 512] == _header(name, size)
                key, _, found = name.partition(".")
                assert found == extension
                keys.add(key)
                members[extension] = place + 512, tar[place + 512 : place + 512 + size]
                end = place + 512 + size
                place = _up(end, 512)
                assert not any(tar[end:place])
            assert len(keys) == 1
            yield keys.pop(), start, members
        assert len(tar) == _up(place + 1024, 10_240) and not any(tar[place:])

    def offsets(self, shard: int) -> list[int]:
        """Return the offsets in NAME.tar.idx."""
        folder, name = self.shards["folder"][shard].as_py(), self.shards["name"][shard].as_py()
        data = (self.root / folder / f"{name}.idx").read_bytes()
        return list(struct.unpack(f"<{len(data) // 8}Q", data))


def _up(place: int, multiple: int) -> int:
    return -(-place // multiple) * multiple


def _header(name: str, size: int) -> bytes:
    """Return a header as the table in docs/format.md defines it."""
    fields = [(0, name), (100, "0000644"), (108, "0000000"), (116, "0000000"), (124, f"{size:011o}"), (136, "0" * 11)]
    header = bytearray(512)
    for place, text in [*fields, (148, " " * 8), (156, "0"), (257, "ustar\x0000")]:
        header[place : place + len(text)] = text.encode("ascii")
    header[148:156] = f"{sum(header):06o}\0 ".encode("ascii")
    return bytes(header)
