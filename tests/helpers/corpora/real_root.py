"""A root of real footage built by the command: two videos, a clip, images, text, and validation samples."""

from __future__ import annotations

import shutil
from pathlib import Path

from framestream.tools import build_shards
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.media.footage import BIKES, FOOTAGE

BUNNY, PHONE = FOOTAGE / "bigbuckbunny.mp4", FOOTAGE / "carphone_pristine.mp4"
SIZE = 112


def turns(*texts: str) -> list[dict]:
    """Return a conversation that alternates human and gpt."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


#: annotations of the split ``train``: eight dialogues, two of them about one video
TRAIN = [
    {"id": "bikes", "video": BIKES.name, "conversations": turns("<image>\nWhat is seen?", "Bicycles.")},
    {"id": "again", "video": BIKES.name, "conversations": turns("<image>\nWho rides?", "Some people.")},
    {"id": "clip", "video": BIKES.name, "start": 2, "end": 7.5, "conversations": turns("<image>\nAnd here?", "More.")},
    {"id": "bunny", "video": BUNNY.name, "conversations": turns("Hello", "Hi", "Tell me.\n<image>", "A rabbit.")},
    {"id": "long", "video": BUNNY.name, "conversations": turns("<image>\nFirst?", "Yes.", "Then?", "No.")},
    {"id": "one", "image": "0.png", "conversations": turns("<image>\nWhich colours?", "Several.")},
    {"id": "two", "image": ["1.png", "2.png"], "conversations": turns("<image> or <image>?", "Both.")},
    {"id": "text", "conversations": corpus.TEXT},
]
VAL = [{"id": "phone", "video": PHONE.name, "conversations": turns("<image>\nWhat is he doing?", "He talks.")}]


def build(folder: Path, most: int = 16, **fields: object) -> Path:
    """Build the root below ``folder`` with ``most`` frames of each video; ``fields`` are added to its manifest."""
    media = folder / "media"
    for number in range(3):
        corpus.still(media / f"{number}.png", seed=number, width=150, height=100)
    for path in (BIKES, BUNNY, PHONE):
        shutil.copy(path, media)
    corpus.annotations(folder / "train.jsonl", TRAIN)
    corpus.annotations(folder / "val.json", VAL)
    entries = [{"annotation": str(folder / "train.jsonl"), "root": str(media)}]
    entries += [{"annotation": str(folder / "val.json"), "root": str(media), "split": "val"}]
    frames = {"sampler": "middle", "min": most, "max": most, "size": SIZE}
    fields = {"frames": frames, "model": {"vision_tower": {"patch": 14}}, **fields}
    manifest = corpus.manifest(folder / "stage2.yaml", entries, **fields)
    assert build_shards.main(["--stage", "2", "--manifest", str(manifest), "--workers", "1"]) == 0
    return folder / "shards" / "stage2"
