"""Measure planning on generated annotation files: dialogues a second and peak memory.

    python -m benchmarks.building.plan [--files 40] [--dialogues 100000] [--folder DIR]

Each file has JSON lines, each a dialogue with two questions about one video. The video is drawn at random from as many
videos as there are dialogues. By default, 4 million dialogues name 2.5 million distinct videos. Nothing is decoded.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from framestream.pipeline.config.data import DataConfig, EntryConfig
from framestream.pipeline.config.manifest import load_manifest
from framestream.tools.builder.planner import make_plan
from framestream.tools.fetch.root_map import resolve_entries

MANIFEST = Path(__file__).parents[2] / "manifests" / "stage3.yaml"


def generate_annotations(path: Path, dialogues: int, videos: int, seed: int) -> None:
    """Write an annotation file of ``dialogues`` dialogues about random ones of ``videos`` videos."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for number in range(dialogues):
            texts = ["<image>\nWhat is the person in the red jacket doing, and how does the scene change later on?"]
            texts.append("The person in the red jacket is walking along a path. " * rng.randint(1, 6))
            texts += ["Why?", "Because the video shows it. " * rng.randint(1, 4)]
            turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
            sample = {
                "id": f"{seed}_{number}",
                "video": f"videos/youtube_video_2024/ytb_{rng.randrange(videos):07d}.mp4",
                "duration": round(rng.uniform(5, 180), 2),
                "conversations": turns,
                "data_source": "30_60_s_youtube_v0_1",
            }
            file.write(json.dumps(sample) + "\n")


def measure_planning(folder: Path) -> None:
    """Plan the generated files in ``folder``; run in a new process, so that peak memory is that of planning alone."""
    root = folder / "media"
    root.mkdir(exist_ok=True)
    files = sorted(folder.glob("*.jsonl"))
    entries = tuple(EntryConfig(annotation=str(path), root=str(root)) for path in files)
    manifest = replace(load_manifest(MANIFEST), data=DataConfig(entries=entries))
    resolved = resolve_entries(manifest)
    before = resource.getrusage(resource.RUSAGE_SELF)
    work = folder / "plan"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    started = time.perf_counter()
    counts = make_plan(manifest, resolved, work).values()
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_SELF)
    dialogues, media = (sum(getattr(count, name) for count in counts) for name in ("dialogues", "media"))
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(path.stat().st_size for path in files)
    print(f"{dialogues:,} dialogues in {len(files)} files of {size / 1e9:.2f} GB, {media:,} distinct media")
    print(f"{seconds:.0f} s, {dialogues / seconds:,.0f} dialogues/s; {used:.0f} s of one core")
    print(f"peak RSS {after.ru_maxrss / 1e6:.2f} GB, of which {before.ru_maxrss / 1e6:.2f} GB before planning")


def main() -> None:
    """Generate files, plan, and print three lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--files", type=int, default=40)
    parser.add_argument("--dialogues", type=int, default=100_000, help="in each file")
    parser.add_argument("--folder", type=Path, help="for the generated files, 3 GB by default; a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        work = [
            (folder / f"{number:03d}.jsonl", options.dialogues, options.files * options.dialogues, number)
            for number in range(options.files)
        ]
        with get_context("spawn").Pool() as pool:
            pool.starmap(generate_annotations, work)
        child = get_context("spawn").Process(target=measure_planning, args=(folder,))
        child.start()
        child.join()
    raise SystemExit(child.exitcode)


if __name__ == "__main__":
    main()
