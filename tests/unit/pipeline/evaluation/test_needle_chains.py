"""Chains of needles: each names the next, the last one is asked about, and the others mislead."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from framestream.pipeline.evaluation.haystack import Haystack
from framestream.pipeline.evaluation.needle_chains import (
    GIVEN,
    build_chains,
    chain_positions,
    given_chain,
    image_contents,
    needle_names,
    write_text,
)
from framestream.pipeline.evaluation.questions import Question
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from tests.helpers.corpora.needles import make, question

NAMES = ("red", "green", "blue", "yellow", "white", "purple", "cyan", "orange")


LEAD = "Next, find the frame of "


def needle(colour: str, images: int = 1, file: str = "", **meta) -> Question:
    marks = "<image>\n" * images
    turns = [{"from": "human", "value": f"{marks}Which colour?"}, {"from": "gpt", "value": colour}]
    media = [MediaFile(f"{file or colour}{number}.png", reader=IMAGE_READER) for number in range(images)]
    return Question.from_turns(colour, turns, "colour", meta, media)


def built(asked: list[Question], hops: int, seed: int = 3) -> tuple[list, list[str]]:
    return build_chains(asked, hops, seed, image_contents(asked))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("hops", [2, 3, 5, 8])
def test_the_texts_lead_from_the_first_image_to_the_one_asked_about(hops, named):
    asked = [needle(name, **({"name": f"the {name} one"} if named else {})) for name in NAMES]
    called = dict(zip(NAMES, needle_names(asked, NAMES), strict=True))
    chains, rejected = built(asked, hops)
    assert not rejected and len(chains) == len(NAMES)
    for chain, name in zip(chains, NAMES, strict=True):
        texts = {}
        for image in chain.needles:
            own = called[image.path.stem.rstrip("0")]
            bears, _, texts[own] = image.text.partition(LEAD)
            assert bears.strip() == ("" if named else f"This is {own}.")
        first = chain.question.text.split("Find the frame of ")[1].split(". Locate")[0]
        path = [first]
        while texts[path[-1]]:
            path.append(texts[path[-1]])
        assert len(path) == hops == len(set(path)) and path[-1] == called[name] and chain.question.answer == name
        astray = set(texts) - set(path)
        assert len(astray) == max(min(3, len(NAMES) - hops - 1), 0)
        assert {texts[other] for other in astray} <= {*astray, ""}
        assert chain.question.text.endswith("based on the final frame: Which colour?")
        assert chain.question.turns[-1]["value"].count("<image>") == 1
    assert len({tuple(image.path for image in chain.needles) for chain in chains}) > 4  # in random order
    assert built(asked, hops)[0] == chains


def test_chains_need_images_of_different_names():
    meta = ({"name": "a red ball"}, {"name": "a red car"}, {})
    alike = [needle("red", file=file, **more) for file, more in zip("abc", meta, strict=True)]
    assert needle_names(alike, "abc") == ["a red ball", "a red car", "number 101"]
    assert built(alike, 3)[1] == [] and len(built(alike, 3)[0]) == 3
    chains, rejected = built(alike, 4)
    assert not chains and "a chain of 4 hops needs 4 images of different names, and there are 3" in rejected[0]


def test_no_answer_is_written_into_a_video():
    """The number of an image without a name is nobody's answer."""
    answers = ("red", "101", "102 or 104", "blue", "white")
    asked = [needle(answer, file=f"f{number}") for number, answer in enumerate(answers)]
    names = needle_names(asked, ["a", "b", "c", "d", "a"])
    assert names == ["number 103", "number 105", "number 106", "number 107", "number 103"]  # one image, one number
    for chain in built(asked, 3)[0]:
        said = " ".join([chain.question.text, *(image.text for image in chain.needles)])
        assert "number 10" in said and not any(answer in said for answer in answers)


@pytest.mark.parametrize("hops", [2, 3])
def test_other_chains_do_not_have_the_image_asked_about(hops):
    """Where there are more names than hops. Two questions about one image are never in one chain."""
    asked = [needle(name) for name in NAMES[: hops + 1]]
    chains, _ = built(asked, hops)
    shown = [{image.path for image in chain.needles} for chain in chains]
    for one in asked:
        assert any(Path(one.media[0].path) not in paths for paths in shown)
    twice = [*asked, needle("round", file=NAMES[0], name="a circle")]
    for chain in built(twice, hops)[0]:
        assert len({image.path for image in chain.needles}) == len(chain.needles)


@pytest.mark.parametrize(
    ("needles", "frames", "expected"), [(2, 8, [0, 7]), (5, 9, [0, 2, 4, 6, 8]), (4, 4, [0, 1, 2, 3])]
)
def test_images_are_spread_from_the_first_frame_to_the_last(needles, frames, expected):
    assert chain_positions(needles, frames) == expected
    with pytest.raises(ValueError, match="ask for more frames"):
        chain_positions(frames + 1, frames)


def test_a_given_chain_has_one_mark_and_the_order_of_the_file():
    chain = given_chain(needle("red", images=3))
    assert [image.path.name for image in chain.needles] == ["red0.png", "red1.png", "red2.png"]
    assert chain.question.turns[0]["value"] == "<image>\nWhich colour?"


def test_a_text_is_written_over_the_lower_edge():
    grey = np.full((160, 160, 3), 128, dtype=np.uint8)
    written = write_text(grey, "Next, find the frame of a red circle on the left side")
    assert (written[:80] == 128).all() and (written[-12:] > 250).any() and (written < 60).any()
    assert (grey == 128).all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("chains")


@pytest.fixture(scope="module")
def manifest(folder):
    return make(folder)


def test_frames_of_a_chain_are_replaced_and_no_other(manifest, folder):
    single = Haystack(manifest, folder / "needles.json", folder, [folder / "0.mp4"], [16], [0])
    chains = Haystack(manifest, folder / "needles.json", folder, [folder / "0.mp4"], [16], [0], hops=2)
    assert len(chains) == 2 and {chains[i].family for i in range(2)} == {"16 frames, chains"}
    plain = single.prompt(0).clips.flatten(0, 1).numpy()
    for i in range(2):
        shown = chains.prompt(i).clips.flatten(0, 1).numpy()
        changed = np.flatnonzero((shown != plain).any(axis=(1, 2, 3)) & (np.arange(16) > 0)).tolist()
        assert changed == [15]  # the other image is in the first frame, as in `plain`
        for position, image in zip((0, 15), chains[i].media[0].needles, strict=True):
            assert (shown[position][-8:, :, 1].max() > 200) == bool(image.text)  # red and blue have no bright green
        assert [LEAD in image.text for image in chains[i].media[0].needles].count(True) == 1
        assert chains.origins[chains[i].key].kind == single.origins[single[i].key].kind


def test_given_chains_are_asked_in_the_order_of_the_file(manifest, folder):
    Image.new("RGB", (64, 64), (10, 200, 10)).save(folder / "green.png")
    row = {"id": 0, "image": ["red.png", "green.png", "blue.png"], "family": "caption"}
    turns = [{"from": "human", "value": "<image><image><image>Which is last?"}, {"from": "gpt", "value": "blue"}]
    (folder / "given.json").write_text(json.dumps([row | {"conversations": turns}]))
    haystack = Haystack(manifest, folder / "given.json", folder, [folder / "0.mp4"], [8], [0], hops=GIVEN)
    frames = haystack.prompt(0).clips.flatten(0, 1).numpy()[:, 64, 64].astype(int)
    assert abs(frames[4] - (10, 200, 10)).max() <= 8 and len(frames) == 8
    assert haystack.origins[haystack[0].key].kind == "caption"
    with pytest.raises(ShardsError, match="a chain of two images or more"):
        one = [json.loads((folder / "needles.json").read_text())[0]]
        (folder / "one.json").write_text(json.dumps(one))
        Haystack(manifest, folder / "one.json", folder, [folder / "0.mp4"], [8], [0], hops=GIVEN)


def test_a_video_is_known_by_the_content_of_its_images(manifest, folder):
    """A copy is the same image. A given chain is about any of its images, a built one about its last."""
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())
    Image.new("RGB", (64, 64), "white").save(folder / "white.png")
    files = ("red.png", "blue.png", "copy.png", "white.png")
    rows = [question(file, answer) for file, answer in zip(files, ("red", "blue", "round", "white"), strict=True)]
    (folder / "copies.json").write_text(json.dumps(rows))
    pairs = [row | {"image": [file, "blue.png"]} for row, file in zip(rows, files, strict=True)]
    for row in pairs:
        row["conversations"] = [{"from": "human", "value": "<image><image>Which?"}, row["conversations"][1]]
    (folder / "pairs.json").write_text(json.dumps(pairs))

    def contents(needles: str, hops: int | None) -> list:
        found = Haystack(manifest, folder / needles, folder, [folder / "0.mp4"], [8], [0], hops=hops)
        return [found.contents(i) for i in range(len(found))]

    single, two, given = contents("copies.json", None), contents("copies.json", 2), contents("pairs.json", GIVEN)
    red, blue, copy, white = (one.asked for one in single)
    assert red == copy != blue and all(one.asked == one.shown and one.items == 1 for one in single)
    assert [one.asked for one in two] == [red, blue, copy, white]
    assert all(one.asked < one.shown <= red | blue | white for one in two)
    assert [one.asked for one in given] == [red | blue, blue, red | blue, white | blue]
    assert all(one.asked == one.shown for one in given)


@pytest.mark.parametrize("style", ["short", "long"])
def test_the_frames_that_fit_are_said(manifest, folder, style):
    language_model = dataclasses.replace(manifest.model.language_model, max_position_embeddings=400)
    model = dataclasses.replace(manifest.model, language_model=language_model)
    frames, text = (
        dataclasses.replace(manifest.frames, time_message=style),
        dataclasses.replace(manifest.text, max_tokens=400),
    )
    short = dataclasses.replace(manifest, model=model, frames=frames, text=text)
    haystack = Haystack(short, folder / "needles.json", folder, [folder / "0.mp4"], [8, 32], [0])
    (line,) = [line for line in haystack.rejected if "frames fit" in line]
    assert line.startswith("a prompt of 32 frames has ") and "the limit of the model is 400 " in line
    most = int(line.split("at most ")[1].split()[0])
    fits = Haystack(short, folder / "needles.json", folder, [folder / "0.mp4"], [most], [0])
    assert fits.prompt(0).tokens < 400 and not [line for line in fits.rejected if "frames fit" in line]
    with pytest.raises(ShardsError, match=f"at most {most} frames fit"):
        Haystack(short, folder / "needles.json", folder, [folder / "0.mp4"], [most + 4], [0])
