"""A corpus of annotation files that grows between builds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.corpora.media_corpus import TEXT, TURNS
from tests.helpers.paths import BUILD_SHARDS


class Corpus:
    """Three annotation files that share media, and the commands that build some of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        media = folder / "media"
        for number in range(9):
            corpus.video(media / f"{number}.mp4", seconds=1, seed=number)
            corpus.still(media / f"{number}.png", seed=number)
        films = [{"id": f"f{n}", "video": f"{n}.mp4", "conversations": TURNS} for n in range(6)]
        films += [{"id": name, "video": f"{name}.mp4", "conversations": TURNS} for name in ("late", "later")]
        stills = [{"id": f"i{n}", "image": f"{n}.png", "conversations": TURNS} for n in range(9)]
        both = [{"id": f"b{n}", "video": f"{n}.mp4", "conversations": TURNS} for n in range(3, 9)]
        both += [{"id": "t", "conversations": TEXT}, {"id": "again", "video": "late.mp4", "conversations": TURNS}]
        both += [{"id": "clip", "video": "1.mp4", "start": 0.5, "conversations": TURNS}, {"id": "bad"}]
        for name, samples in (("films", films), ("stills", stills), ("both", both)):
            corpus.annotations(folder / f"{name}.jsonl", samples)

    def command(self, out: Path, *names: str, options: tuple[str, ...] = ()) -> list[str]:
        entries = [
            {"annotation": str(self.folder / f"{name}.jsonl"), "root": str(self.folder / "media")} for name in names
        ]
        path = corpus.manifest(self.folder / f"{'-'.join(names)}.yaml", entries)
        fixed = [sys.executable, str(BUILD_SHARDS), "--stage", "2", "--manifest", str(path), "--out", str(out)]
        return [*fixed, "--workers", "2", *options]

    def build(self, out: Path, *names: str, options: tuple[str, ...] = ()) -> str:
        ran = subprocess.run(self.command(out, *names, options=options), capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout
