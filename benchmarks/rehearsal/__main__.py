"""Rehearse the published recipe from annotation files to scores, with its own manifests, in minutes on a CPU.

    python -m benchmarks.rehearsal [--short] [--folder DIR]

A local hub serves the published repositories by their names: annotation files of every entry in their formats, a few
small media in the archives, parquet files and folders that manifests/roots.example.yaml names, the vision encoder's
file and a narrow Qwen2. Then the commands of docs/recipe.md run in an empty folder: plan, build and verify the shards
of the four stages, train each stage from the one before on two ZeRO-3 ranks, report, export, ask and score. The
manifests are the published ones. ``--set`` changes the root map, and the width and depth of the model.

Exits with 1 at the first command that fails, at a sample that is left out, at a dialogue that is not seen, at a loss
that is not finite, and at a frozen part that has changed.

``--short`` runs stages 1 and 4 on one rank, with one entry for each reader and location, and a smaller vocabulary and
batch, for the tests.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks.rehearsal.commands import RehearsalError, Stage
from benchmarks.rehearsal.hub import STAGES, DataWorld, published_entries, write_roots
from benchmarks.rehearsal.media import draw_video
from benchmarks.rehearsal.weights import (
    ENCODER_FILE,
    ENCODERS,
    LANGUAGE_MODEL,
    NARROW,
    SMALLEST,
    narrow_overrides,
    weight_repositories,
)
from tests.helpers.corpora.layouts import write
from tests.helpers.servers.fetch_hub import serve_hub
from tests.helpers.servers.hub_server import serve
from tests.helpers.servers.web_server import Server

COUNTS = {1: 300, 2: 24, 3: 9, 4: 24}  #: samples of an annotation file, by the first stage that uses it
SHORT_COUNT = 4
#: entries of the short form: one for each reader, container and kind of location
SHORT_ENTRIES = {
    "blip_laion_cc_sbu_558k",  # zip
    "smit_caption_481k",  # folder, mp4
    "synthdog_en_processed",  # tar.gz
    "textcaps",  # parquet
    "m4_instruct_annotations",  # zip, several images a dialogue
    "vqa_tvqa-tvqa_123k",  # folders of frames, clips
    "vqa_tgif_count-openend_qa_train_openend_26839",  # gif
    "classification_ssv2-ssv2-train_40k",  # webm
    "lsmdc-lsmdc_297k",  # avi
    "moviechat1k_caption-MovieChat-train_caption_1k",  # folder of a hub repository
    "htstep_eventcount-longvideo_annos-htstep_eventcount_2k_2k",  # frames in a zip in parts
    "llava-video_0_30_s_academic_v0_1_cap_processed_11985_with_duration",  # videos in tar.gz
}
PAGE = 50  #: files of one page of the hub's listings


def main(arguments: list[str] | None = None) -> int:
    """Run the rehearsal; returns 0, or 1 for a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rehearsal", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--short", action="store_true", help="stages 1 and 4, one rank, one entry of each kind")
    parser.add_argument("--folder", type=Path, help="an empty folder, which is kept; a temporary one by default")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.folder or Path(scratch)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            parser.error(f"--folder {folder}: is not empty; name another one")
        try:
            rehearse(folder, options.short)
        except RehearsalError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    return 0


def rehearse(folder: Path, short: bool) -> None:
    """Draw the data and the weights, serve them, and run all commands in ``folder``.

    Raises:
        RehearsalError: at the first thing that is not as it must be.
    """
    model = SMALLEST if short else NARROW
    world, weights = draw_world(folder, short), weight_repositories(model)
    with Server() as server, serve(weights) as models:
        for name, files in world.repositories.items():
            serve_hub(server, files, name, PAGE)
        stage = Stage(folder, server.url, models.endpoint, narrow_overrides(model), ranks=1 if short else 2, skip=short)
        if short:
            run_stages(stage, world, (1, 4), "batching.global_batch=4", "batching.row_multiple=4")
        else:
            stage.fetch_weights(ENCODERS, ENCODER_FILE)
            stage.fetch_weights(LANGUAGE_MODEL)
            run_stages(stage, world, STAGES)
        run_after(stage, short)
    total = sum(seconds for _, seconds in stage.seconds)
    print(f"{total:7.1f} s  {len(stage.seconds)} commands, {len(world.counts)} annotation files")


def draw_world(folder: Path, short: bool = False) -> DataWorld:
    """Draw all data sets, or those of the short form, with the root map ``roots.yaml``."""
    world = DataWorld(folder)
    write_roots(folder)
    firsts: dict[str, int] = {}
    for stage in STAGES:
        for annotation in published_entries([stage]):
            firsts.setdefault(annotation, stage)
    for number, (annotation, entries) in enumerate(published_entries().items()):
        if not short or entries[0].name in SHORT_ENTRIES:
            world.add(entries, number, SHORT_COUNT if short else COUNTS[firsts[annotation]])
    write(folder / "questions", _questions())
    world.finish()
    return world


def _questions() -> dict[str, bytes]:
    """Return a file of scored questions about two videos, and the videos."""
    files = {f"v{n}.mp4": draw_video("mp4", n, 68) for n in range(2)}
    samples = [
        {
            "id": name,
            "video": name,
            "family": "order",
            "options": ["A", "B"],
            "conversations": [
                {"from": "human", "value": "<image>\nWhich?\n(A) left\n(B) right"},
                {"from": "gpt", "value": "AB"[number]},
            ],
        }
        for number, name in enumerate(files)
    ]
    return files | {"questions.json": json.dumps(samples).encode()}


def run_stages(stage: Stage, world: DataWorld, numbers: tuple[int, ...], *assignments: str) -> None:
    """Build and train stages, each from the one before, and check that frozen parts rest."""
    for position, number in enumerate(numbers):
        stage.build(number, world.counts)
        before = f"init_from.run=runs/stage{numbers[position - 1]}"
        stage.train(number, *assignments, *([before] if position and stage.skip else []))
        if number == 4:
            rested = r"model\.(layers|embed_tokens|norm)\.|lm_head"
            stage.check_learned(stage.final_weights(numbers[position - 1]), stage.final_weights(4), rested)


def run_after(stage: Stage, short: bool) -> None:
    """Export, ask and score the last stage; report all stages."""
    python, run = sys.executable, "runs/stage4"
    offline = {"HF_HUB_OFFLINE": "1"} if not short else {}
    stage.run("export", python, "-m", "trainer.export", "--checkpoint", run, "--out", "release", **offline)
    scored = ["--annotations", "questions/questions.json", "--root", "questions"]
    manifest = ["--manifest", f"{run}/manifest.yaml"]
    stage.run("evaluate", python, "-m", "trainer.evaluate", *manifest, *scored, "--html", "scores.html", **offline)
    if short:
        return
    asked = ["--video", "questions/v0.mp4", "--question", "What is it?", "--max-new-tokens", "4"]
    stage.run("chat", python, "-m", "trainer.chat", "--checkpoint", run, *asked, **offline)
    runs = [f"runs/stage{number}" for number in STAGES]
    stage.run("report", python, "-m", "trainer.report", *runs, "--out", "report.html")


if __name__ == "__main__":
    sys.exit(main())
