"""A small root built by the command: videos, a clip, images, text, validation samples, and a ledger."""

from __future__ import annotations

from pathlib import Path

from framestream.tools import build_shards
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS

HOSTILE = "<image>\n</span><script>alert(1)</script><img src=x onerror=alert(1)> \u202egnp.exe"


def build_root(folder: Path, **fields: object) -> Path:
    """Build the root below ``folder``: five shards, 15 samples, 19 frames. ``fields`` are added to its manifest."""
    media = folder / "media"
    for number in range(3):
        corpus.video(media / f"{number}.mp4", seed=number)
        corpus.still(media / f"<b>{number}.png", seed=number)
    (media / "page.mp4").write_text("<html>")
    two = [{"from": "human", "value": "<image> or <image>?"}, TURNS[1]]
    stills = ["<b>0.png", "<b>1.png"]
    samples = [{"id": f"v{number}", "video": f"{number}.mp4", "conversations": TURNS} for number in range(3)]
    samples += [{"id": "two", "image": stills, "conversations": two}, {"id": "t", "conversations": TEXT}]
    samples += [{"id": "clip", "video": "0.mp4", "start": 0.5, "end": 2, "conversations": TURNS, "note": 7}]
    samples += [{"id": "page", "video": "page.mp4", "conversations": TURNS}, {"id": "bad"}]
    corpus.annotations(folder / "all.jsonl", samples)
    hostile = [{"from": "human", "value": HOSTILE}, TURNS[1]]
    held = [{"id": "h", "image": "<b>2.png", "conversations": TURNS}]
    held += [{"id": "<i>h</i>", "video": "1.mp4", "conversations": hostile}]
    corpus.annotations(folder / "held.json", held)
    entries = [{"annotation": str(folder / "all.jsonl"), "root": str(media)}]
    entries += [{"annotation": str(folder / "held.json"), "root": str(media), "split": "val"}]
    frames = {"sampler": "dynamic_fps1", "min": 4, "max": 4, "size": 64}
    model = {"vision_tower": {"patch": 8}}
    manifest = corpus.manifest(folder / "stage2.yaml", entries, frames=frames, model=model, **fields)
    assert build_shards.main(["--stage", "2", "--manifest", str(manifest), "--workers", "1"]) == 0
    return folder / "shards" / "stage2"
