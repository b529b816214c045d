"""The data of the demo, read back by the libraries of its users: PyAV, Pillow, transformers, json."""

from __future__ import annotations

import collections
import hashlib
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.config.manifest import load_manifest
from framestream.tools import demo_data
from framestream.tools.demo import dialogues as demo_dialogues
from framestream.tools.demo import footage
from framestream.tools.demo import tokenizer as demo_tokenizer
from framestream.tools.demo import worlds as demo_worlds
from framestream.tools.demo.worlds import COLORS
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

SHARE = 0.004


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    demo_data.generate_demo(out, seed=3, workers=2, share=SHARE)
    return out


def rows(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def nearest_color(pixels: np.ndarray) -> collections.Counter:
    """How many of (n, 3) pixels are close to each named colour."""
    names = list(COLORS)
    distance = np.linalg.norm(pixels[:, None].astype(float) - np.array(list(COLORS.values())), axis=2)
    close = distance.min(1) < 45
    return collections.Counter(names[i] for i in distance[close].argmin(1))


def video_frames(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_same_seed_gives_the_same_bytes_and_another_seed_other_ones(made, tmp_path):
    demo_data.generate_demo(tmp_path / "again", seed=3, workers=1, share=SHARE)
    assert digests(tmp_path / "again") == digests(made)
    plans = [demo_worlds.plan("train", seed, SHARE) for seed in (3, 4)]
    assert plans[0] != plans[1]


def test_a_second_run_changes_nothing_and_spares_other_folders(made, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    assert demo_data.main(["--out", str(made), "--seed", "3", "--share", str(SHARE)]) == 0
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    (tmp_path / "mine.txt").write_text("keep")
    assert demo_data.main(["--out", str(tmp_path), "--share", str(SHARE)]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_every_annotated_medium_exists_and_has_as_many_marks(made):
    for path in (made / "annotations").iterdir():
        records = rows(path)
        assert records, path
        for record in records:
            images = record.get("image", [])
            media = [record["video"]] if "video" in record else [images] if isinstance(images, str) else images
            assert all((made / "media" / name).exists() for name in media), record
            turns = record["conversations"]
            assert sum(turn["value"].count("<image>") for turn in turns) == len(media)
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(turn["value"].strip() for turn in turns) and "family" in record


def test_what_is_seen_is_what_the_answers_say(made):
    checked = collections.Counter()
    for split in ("train", "heldout"):
        for world in demo_worlds.plan(split, 3, SHARE):
            frames = video_frames(made / "media" / demo_data.video_name(world))
            assert len(frames) == world.frames and frames.shape[1:] == (demo_worlds.SIDE, demo_worlds.SIDE, 3)
            facts = world.facts
            if "first colour" in facts:
                for frame, name in ((frames[0], "first colour"), (frames[-1], "last colour")):
                    assert nearest_color(frame.reshape(-1, 3)).most_common(1)[0][0] == facts[name]
                assert not nearest_color(frames[len(frames) // 2].reshape(-1, 3))
            elif world.kind == "needle":
                lit = [bool(nearest_color(frame[70:90, 70:90].reshape(-1, 3))) for frame in frames]
                assert sum(lit) == 1
            else:
                middle = frames[len(frames) // 2]
                assert nearest_color(middle.reshape(-1, 3)).most_common(1)[0][0] == facts["colour"]
            if "side" in facts:
                seen = np.linalg.norm(frames[0].astype(float) - COLORS[facts["colour"]], axis=2) < 45
                assert (np.nonzero(seen)[1].mean() < demo_worlds.SIDE / 2) == (facts["side"] == "left")
            checked[world.kind] += 1
    assert set(checked) == set(demo_worlds.SIZES["train"])


def test_orders_need_at_least_eight_frames_between_the_colours():
    for world in demo_worlds.plan("heldout", 0):
        if world.kind == "order":
            seconds = np.arange(16) + 0.5
            first, last = world.appearances
            before, after = seconds[seconds < first.end], seconds[seconds >= last.start]
            assert len(before) >= 2 and len(after) >= 2 and after[0] - before[-1] >= 8


def test_held_out_answers_are_balanced_over_100_questions():
    answers = collections.defaultdict(collections.Counter)
    for world in demo_worlds.plan("heldout", 0):
        for record in demo_dialogues.held_out_dialogues(world, "x.mp4", 0):
            answers[record["family"]][record["conversations"][-1]["value"]] += 1
    for clip in footage.plan_clips("heldout", 0):
        answers["film"][clip.film] += 1
    assert set(answers) == set(demo_dialogues.OPTIONS) and len(answers) == 9
    for family, counts in answers.items():
        assert counts.total() >= 100 and set(counts) == set(demo_dialogues.OPTIONS[family]), family
        assert len(set(counts.values())) == 1, family


def test_train_and_held_out_worlds_are_disjoint(made):
    names = {split: {world.name for world in demo_worlds.plan(split, 3)} for split in ("train", "heldout")}
    assert not names["train"] & names["heldout"]
    train, heldout = (digests(made / "media" / split) for split in ("train", "heldout"))
    assert not set(train.values()) & set(heldout.values())


def test_long_clips_last_more_than_ten_minutes(made):
    for split in ("train", "heldout"):
        for path in (made / "media" / split).glob("*-long-*.mp4"):
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                assert stream.codec_context.name == "h264"
                assert stream.duration * stream.time_base > 600 and stream.frames > 512


def test_film_clips_of_both_splits_are_of_other_parts(made):
    """What is encoded is what was cut, and every film is long enough for the parts."""
    parts = collections.defaultdict(set)
    for split in footage.SIZES:
        for clip in footage.plan_clips(split, 3):
            parts[split].add((clip.film, clip.part))
    assert len(parts["heldout"]) == 6 and len(parts["train"]) == 24 and not parts["train"] & parts["heldout"]
    for clip in footage.plan_clips("heldout", 3, SHARE) + footage.plan_clips("train", 3, SHARE):
        frames = video_frames(made / "media" / demo_data.video_name(clip))
        assert frames.shape == (footage.FRAMES, demo_worlds.SIDE, demo_worlds.SIDE, 3)
        film = footage.film_path(clip.film)
        with av.open(str(film)) as container:
            count = sum(1 for _ in container.decode(video=0))
        assert count >= footage.PARTS * (footage.STRIDE * (footage.FRAMES - 1) + 1)
        wanted = np.stack(footage.clip_frames(clip)).astype(float)
        assert np.abs(frames - wanted).mean() < 12


def test_other_containers_and_stills(made):
    with Image.open(made / "media/gif/shape.gif") as gif:
        assert gif.n_frames == 8
    assert [path.name for path in sorted((made / "media/folder/shape").iterdir())][:2] == ["00001.jpg", "00002.jpg"]
    for form, size in demo_data.IMAGE_SIZES.items():
        for path in (made / "media/stills").glob(f"{form}-*"):
            with Image.open(path) as still:
                assert still.size == size


def test_tokenizer_loads_in_transformers_laid_out_like_qwen2(made):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "tokenizer")
    assert tokenizer("\n")["input_ids"] == [198]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert [tokenizer.convert_tokens_to_ids(t) for t in demo_tokenizer.SPECIAL] == list(range(len(tokenizer)))[-3:]
    for word in (*COLORS, *demo_worlds.SHAPES, *demo_worlds.SIDES, *demo_worlds.NUMBERS, *demo_worlds.DIRECTIONS):
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(" " + word)["input_ids"]) == 1, word
    text = "<|im_start|>user\nWie heißt das? 12.50 é\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("stage", (1, 2, 3, 4))
def test_demo_manifests_name_files_that_are_made(made, stage):
    manifest = load_manifest(ROOT / f"manifests/demo/stage{stage}.yaml")
    assert manifest.stage == stage and manifest.output == f"demo/runs/stage{stage}"
    for entry in manifest.data.entries:
        assert (made / Path(entry.annotation).relative_to("demo/data")).is_file(), entry.annotation
    vocabulary = json.loads((made / "generated.json").read_text())["vocabulary"]
    assert vocabulary <= manifest.model.language_model.vocab_size
    if stage == 1:
        assert all(len(row["conversations"]) == 2 for e in manifest.data.entries for row in _named(made, e))


def _named(made: Path, entry) -> list[dict]:
    return rows(made / Path(entry.annotation).relative_to("demo/data"))
