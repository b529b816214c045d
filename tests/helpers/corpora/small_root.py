"""Small shard roots for tests of reading: complete shards and index, written without the builder.

Frame f of video v has one flat color that encodes (v, f), so that a test can identify each frame.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import xxhash

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.schema import from_dict
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.media.mjpeg_mp4 import mjpeg_frames, mux_mjpeg
from framestream.pipeline.shards.index import DIALOGUE_SCHEMA, MEDIA_SCHEMA, SHARD_SCHEMA, build_table, write_index
from framestream.pipeline.shards.samples import dialogue_key, media_key
from framestream.pipeline.shards.writer import ShardWriter
from tests.helpers.golden_data import TOKENIZER

SIZE = 64


def colour(video: int, frame: int) -> tuple[int, int, int]:
    """Return the color of a frame; channels of neighbors differ by at least 8, and JPEG changes them by at most 2."""
    return 8 + 8 * (frame % 30), 8 + 8 * (frame // 30), 8 + 20 * (video % 12)


def turns(*texts: str) -> list[dict]:
    """Return a conversation that alternates human and gpt."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def manifest(root: Path, **over) -> Manifest:
    """Return a manifest for ``root``/stage2; dotted names in ``over`` (with __ for the dot) replace fields."""
    value = {
        "stage": 2,
        "output": str(root / "run"),
        "shards": str(root),
        "data": {"entries": [{"annotation": "a.json"}]},
        "frames": {"sampler": "middle", "min": 8, "max": 8, "size": SIZE},
        "images": {"max_grid": 2},
        "text": {"tokenizer": str(TOKENIZER), "max_tokens": 1024},
        "batching": {"global_batch": 6, "row_multiple": 4},
        "loader": {"threads": 2, "prefetch_mb": 4, "max_unreadable": 2},
        "model": {"vision_tower": {"patch": 8, "group_tokens": 512}},
        "init_from": {"vision_tower": "random", "connector": "random", "language_model": "random"},
        "train": {part: {"train": True, "lr": 1e-3} for part in ("vision_tower", "connector", "language_model")},
    }
    for name, item in over.items():
        at = value
        *parents, last = name.split("__")
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = item
    return from_dict(Manifest, value, "test")


class Root:
    """Collects media and dialogues, then writes ROOT/stage2."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        self.folder, self.size = folder, size
        self.media: list[dict] = []
        self.members: list[tuple[str, bytes]] = []
        self.dialogues: list[dict] = []

    def video(self, vlen: int, stored: int, fps: float = 2.0) -> int:
        """Add a clip of ``vlen`` source frames with ``stored`` evenly spaced ones; return its row."""
        number = len(self.media)
        index = np.unique(np.linspace(0, vlen - 1, stored).round().astype(int))
        pictures = [np.full((self.size, self.size, 3), colour(number, f), dtype=np.uint8) for f in index]
        data = mux_mjpeg(
            [encode_jpeg(picture, 95, "444") for picture in pictures], index / fps, vlen / fps, self.size, self.size
        )
        return self._add("video", data, self.size, self.size, index, vlen, fps)

    def still(self, width: int, height: int) -> int:
        """Add an image with a different color in each quarter; return its row."""
        picture = np.empty((height, width, 3), dtype=np.uint8)
        picture[: height // 2, : width // 2] = (200, 20, 20)
        picture[: height // 2, width // 2 :] = (20, 200, 20)
        picture[height // 2 :, : width // 2] = (20, 20, 200)
        picture[height // 2 :, width // 2 :] = (120, 120, 20 + 10 * (len(self.media) % 20))
        data = encode_jpeg(picture, 95, "444")
        return self._add("image", data, width, height, np.zeros(1, dtype=int), 1, 0.0)

    def _add(self, kind: str, data: bytes, width: int, height: int, index: np.ndarray, vlen: int, fps: float) -> int:
        number = len(self.media)
        offsets, sizes = [0], [len(data)]
        if kind == "video":
            offsets, sizes, _ = mjpeg_frames(data)
        self.members.append((kind, data))
        self.media.append(
            {
                "key": media_key(kind, f"{kind} {number}"),
                "kind": kind,
                "split": "train",
                "width": width,
                "height": height,
                "source_width": width,
                "source_height": height,
                "vlen": vlen,
                "fps": fps,
                "duration": vlen / fps if fps else 0.0,
                "start": 0.0,
                "sample": list(range(len(index))),
                "frame_index": index.tolist(),
                "timestamps": [f / fps if fps else 0.0 for f in index.tolist()],
                "frame_offset": list(map(int, offsets)),
                "frame_size": list(map(int, sizes)),
                "frame_digest": [
                    xxhash.xxh3_64_intdigest(data[start : start + size]) % 2**32
                    for start, size in zip(offsets, sizes, strict=True)
                ],
                "sha256": "",
                "source": f"source-{number}",
            }
        )
        return number

    def dialogue(self, conversation: list[dict], media: list[int] = (), split="train", entry="a", meta=None) -> int:
        """Add a dialogue; return its row."""
        number = len(self.dialogues)
        self.dialogues.append(
            {
                "key": dialogue_key(f"dialogue {number}"),
                "split": split,
                "entry": entry,
                "id": str(number),
                "media": list(media),
                "conversations": json.dumps(conversation),
                "meta": json.dumps(meta or {}),
            }
        )
        return number

    def write(self) -> Path:
        """Write shards, index and build.json; return the folder for ``manifest``."""
        stage = self.folder / "stage2"
        shards = []
        for kind, extension in (("video", "mp4"), ("image", "jpg")):
            rows = [i for i, (k, _) in enumerate(self.members) if k == kind]
            for number, part in enumerate([rows[::2], rows[1::2]]):  # two shards of each kind
                if not part:
                    continue
                path = stage / kind / f"train-{number:06d}.tar"
                path.parent.mkdir(parents=True, exist_ok=True)
                with ShardWriter(path) as writer:
                    for i in part:
                        offset, size = writer.add(self.media[i]["key"], {extension: self.members[i][1]})[extension]
                        self.media[i] |= {"shard": len(shards), "offset": offset, "size": size}
                        self.media[i]["frame_offset"] = [o + offset for o in self.media[i]["frame_offset"]]
                shards.append(
                    {
                        "folder": kind,
                        "split": "train",
                        "name": path.name,
                        "samples": len(part),
                        "bytes": writer.bytes,
                        "sha256": writer.sha256,
                    }
                )
        stage.mkdir(parents=True, exist_ok=True)
        fingerprint = write_index(
            stage,
            build_table(MEDIA_SCHEMA, self.media),
            build_table(DIALOGUE_SCHEMA, self.dialogues),
            build_table(SHARD_SCHEMA, shards),
        )
        (stage / "build.json").write_text(json.dumps({"index_fingerprint": fingerprint}))
        return self.folder


def mixed_root(folder: Path, copies: int = 3) -> Path:
    """Write ``copies`` dialogues of each kind: a video, an image, several images, a video after text, and only text."""
    root = Root(folder)
    for i in range(copies):
        short, long = root.video(5 + i, 5 + i), root.video(60 + i, 16)
        wide, tall, small = root.still(150, 60), root.still(50, 140 + i), root.still(30, 20)
        root.dialogue(turns(f"<image>\nWhat is number {i}?", "A square."), [short], entry="videos")
        root.dialogue(turns("<image>\nWhat moves?", "Nothing " * (i + 1)), [long], entry="videos")
        root.dialogue(turns("Hello", "Hi", "<image>\nAnd here?", f"{i} circles."), [long], entry="videos")
        root.dialogue(turns("<image>\nWhich colours?", "Four of them."), [wide], entry="stills")
        root.dialogue(turns("<image>\nIs it tall?", "Yes, it is."), [tall], entry="stills")
        root.dialogue(turns("First <image> then <image>?", "The same."), [small, tall], entry="stills")
        root.dialogue(turns("Count to three.", "One two three." * (1 + 5 * i)), entry="texts")
    for i in range(4):
        root.dialogue(
            turns("Look.", "I do.", f"<image>\nWhich is it, {i}?", f"It is {i}."),
            [i % 2],
            split="val",
            entry="held out",
            meta={"family": "count"} if i % 2 else {},
        )
    return root.write()
