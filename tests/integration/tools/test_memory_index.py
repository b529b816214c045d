"""An in-memory index of files has the rows that the same files have in shards."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framestream.pipeline import Questions, load_manifest
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, build_memory_index
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.tools.build_shards import main
from tests.helpers.corpora import media_corpus as corpus
from tests.helpers.media.footage import BIKES
from tests.helpers.paths import ROOT

TOKENIZER = ROOT / "tests" / "golden" / "tokens_labels" / "tokenizer"
ASKED = {"from": "human", "value": "<image>\nWhat is it?"}
CLIP = {"start": 2.2, "end": 7.4}


def test_animations_are_videos_and_images_are_images(tmp_path: Path) -> None:
    images = [Image.new("RGB", (32, 32), color) for color in ("red", "lime", "blue")]
    readers = {"a.gif": "gif", "a.png": "decord", "a.webp": "decord"}
    for name, reader in readers.items():
        images[0].save(tmp_path / name, save_all=True, append_images=images[1:])
        images[0].save(tmp_path / f"one-{name}")
        assert MediaFile(tmp_path / name).detect_reader() == reader
        expected = "gif" if name == "a.gif" else IMAGE_READER
        assert MediaFile(tmp_path / f"one-{name}").detect_reader() == expected


@pytest.fixture(scope="module", params=["none", "published"])
def built(request, tmp_path_factory) -> Manifest:
    """Shards of a film, a clip of it, a GIF, a folder of frames, a picture, and two pictures in one dialogue."""
    folder = tmp_path_factory.mktemp("handful")
    media = folder / "media"
    media.mkdir()
    shutil.copy(BIKES, media / "film.mp4")
    corpus.gif(media / "moving.gif", frames=9)
    for number in range(1, 8):
        corpus.still(media / "frames" / f"{number:05d}.jpg", seed=number, width=90)
    for number, size in enumerate(((300, 140), (40, 30))):
        corpus.still(media / f"{number}.png", number, *size)
    turns = [ASKED, {"from": "gpt", "value": "It is that."}]
    two = [{**ASKED, "value": "<image><image>\nWhich?"}, turns[1]]
    samples = {
        "film": [{"video": "film.mp4"}, {"video": "film.mp4", **CLIP}],
        "gif": [{"video": "moving.gif"}],
        "img": [{"video": "frames"}],
        "": [{"image": "0.png"}, {"image": ["0.png", "1.png"], "conversations": two}],
    }
    entries = []
    for reader, named in samples.items():
        listed = [{"id": f"{reader}{n}", "conversations": turns, **sample} for n, sample in enumerate(named)]
        path = corpus.annotations(folder / f"{reader or 'still'}.json", listed)
        how = {"reader": reader} if reader in ("gif", "img") else {}
        entries.append({"annotation": str(path), "root": str(media), "split": "val", **how})
    fields = {
        "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 16, "size": 128, "time_message": "long"},
        "images": {"max_grid": 3},
        "text": {"tokenizer": str(TOKENIZER)},
    }
    path = corpus.manifest(folder / "stage2.yaml", entries, compat=request.param, **fields)
    assert main(["--stage", "2", "--manifest", str(path), "--workers", "1"]) == 0
    return load_manifest(path)


def test_rows_are_those_of_the_shards(built):
    questions, conversation = Questions(built), build_chat_template(built)
    media = Path(built.data.entries[0].root)
    files = {
        "film0": [MediaFile(media / "film.mp4")],
        "film1": [MediaFile(media / "film.mp4", **CLIP)],
        "gif0": [MediaFile(media / "moving.gif")],
        "img0": [MediaFile(media / "frames")],
        "0": [MediaFile(media / "0.png")],
        "1": [MediaFile(media / "0.png"), MediaFile(media / "1.png")],
    }
    asked = {name: i for i, name in enumerate(questions.index.dialogues["id"].to_pylist())}
    assert asked.keys() == files.keys()
    for name, shown in files.items():
        theirs = questions.prompt(asked[name])
        prompts = PromptBuilder(built, MediaViews(build_memory_index(shown, built), built), conversation)
        turn = {**ASKED, "value": "<image><image>\nWhich?"} if len(shown) > 1 else ASKED
        ours = prompts.build([turn], range(len(shown)))
        for field in ("input_ids", "visual_index", "clips", "image_tiles", "position_ids"):
            assert np.array_equal(getattr(ours, field), getattr(theirs, field)), (name, field)
        assert len(ours.clips) + len(ours.image_tiles)


def test_what_cannot_be_shown_is_named(built, tmp_path):
    (tmp_path / "page.mp4").write_text("<html>not here</html>")
    (tmp_path / "empty.jpg").touch()
    picture = corpus.still(tmp_path / "a.png")
    faults = {
        MediaFile(tmp_path / "page.mp4"): "page.mp4",
        MediaFile(tmp_path / "empty.jpg"): "has no bytes",
        MediaFile(tmp_path / "gone.mp4"): "No such file",
        MediaFile(picture, start=1.0): "only videos have a start",
        MediaFile(BIKES, start=500.0, end=600.0): "bikes.mp4",
    }
    for file, words in faults.items():
        with pytest.raises(MediaError, match=words):
            build_memory_index([file], built)
