"""Chains of needles: images in one video, where each names the next; the question is about the last one.

As in the multi-hop needle in a haystack of VideoChat-Flash (arXiv 2501.00574 and its evaluation code): the question
names the first image of a chain. Each image bears a text that names the next one, and the last one has none. Further
images mislead: they name each other. All of them are spread evenly over the video in random order, the first at its
beginning and the last at its end.

What names an image is written into the video. So an image without ``name`` is not called by its answer: it gets a
number, which it bears too.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from framestream.pipeline.evaluation.questions import Question
from framestream.pipeline.media.errors import MediaError, check_file
from framestream.pipeline.tokenization.chat_template import IMAGE_PLACEHOLDER, turn_text
from framestream.pipeline.utils.atomic_io import file_sha256

GIVEN = 0  #: in place of a number of hops: chains are those of the annotation file
DISTRACTORS = 3  #: images beside a chain, where there are as many others
MAX_NAME_CHARACTERS = 80
FIRST_NUMBER = 101  #: of an image without a name
LINE_SHARE, LETTER_SHARE = 0.09, 0.55  #: height of a line by that of the frame, width of a letter by that of a line
ASK = (
    "Find the frame of {name}. Locate the final frame based on the instructions in the image, "
    "and answer the following question based on the final frame: {question}"
)


class Needle(NamedTuple):
    """An image that replaces a frame."""

    path: Path
    text: str = ""  #: written over its lower edge


class NeedleChain(NamedTuple):
    """A question about the last of several images."""

    question: Question  #: with one mark, that of the video
    needles: tuple[Needle, ...]  #: in the order of the video, with misleading ones
    name: str  #: of the images; several questions may be about one chain


def image_contents(questions: Sequence[Question]) -> dict[Path, str]:
    """Return what identifies the image of each path: its digest, or the path of a file that cannot be read."""
    found: dict[Path, str] = {}
    for path in (Path(file.path) for question in questions for file in question.media):
        if path not in found:
            try:
                found[path] = file_sha256(check_file(path)).hex()
            except (MediaError, OSError):
                found[path] = str(path)
    return found


def build_chains(
    questions: Sequence[Question], hops: int, seed: int, contents: Mapping[Path, str]
) -> tuple[list[NeedleChain], list[str]]:
    """Make a chain of ``hops`` images for each question about one image.

    A chain has each image and each name once, and leaves out the images of one further name where there are enough.
    Each name is left out by others, so a question finds chains without its image. They are its blind control.

    Args:
        questions: each has one :class:`framestream.pipeline.shards.memory_index.MediaFile`.
        hops: images of a chain, at least 2.
        seed: of the choice and the order.
        contents: of :func:`image_contents`.

    Returns:
        the chains, and a line for each question without one.
    """
    chains, rejected = [], []
    images = [contents[Path(question.media[0].path)] for question in questions]
    names = needle_names(questions, images)
    answers = [" ".join(question.answer.split()).casefold() for question in questions]
    different = list(dict.fromkeys(names))
    left_out = dict(zip(different, [*different[1:], different[0]], strict=True))
    for number, question in enumerate(questions):
        rng = np.random.default_rng([seed, number])
        drawn = rng.permutation(len(questions)).tolist()
        alike = [other for other in drawn if answers[other] == answers[number]]  # they come last
        mixed = [*(other for other in drawn if answers[other] != answers[number]), *alike]
        for unused in (left_out[names[number]], None):
            used_names, used_images = {names[number], unused}, {images[number]}
            chosen: list[int] = []
            for other in mixed:
                if len(chosen) == hops - 1 + DISTRACTORS:
                    break
                if names[other] not in used_names and images[other] not in used_images:
                    chosen.append(other)
                    used_names.add(names[other])
                    used_images.add(images[other])
            if len(chosen) >= hops - 1:
                break
        else:
            rejected.append(
                f"{question.key}: a chain of {hops} hops needs {hops} images of different names, and there are "
                f"{len(chosen) + 1}; add images, give them a name, or lower --hops"
            )
            continue
        way, astray = [*chosen[: hops - 1], number], chosen[hops - 1 :]
        following = dict(zip(way, way[1:], strict=False)) | dict(zip(astray, astray[1:] + astray[:1], strict=True))
        needles = [
            Needle(Path(questions[i].media[0].path), _needle_text(questions[i], names[i], names[following.get(i, i)]))
            for i in (*way, *astray)
        ]
        order = rng.permutation(len(needles))
        asked = ASK.format(name=names[way[0]], question=question.text)
        chains.append(NeedleChain(_ask(question, asked), tuple(needles[i] for i in order), question.key))
    return chains, rejected


def given_chain(question: Question) -> NeedleChain:
    """Return the chain of a question about several images, which bear their texts and are in the order of the video."""
    paths = [file.path for file in question.media]
    plain = [{**turn, "value": turn_text(turn).replace(IMAGE_PLACEHOLDER, "").strip()} for turn in question.turns]
    plain[0]["value"] = f"{IMAGE_PLACEHOLDER}\n{plain[0]['value']}"
    name = " ".join(map(str, paths))
    return NeedleChain(dataclasses.replace(question, turns=plain), tuple(Needle(Path(path)) for path in paths), name)


def needle_names(questions: Sequence[Question], images: Sequence[str]) -> list[str]:
    """Return what chains call the image of each question: its ``name``, or a number that no question is answered by.

    Args:
        questions: about one image each.
        images: what identifies the image of each. Equal images have one number.
    """
    answers = set(re.findall(r"\d+", " ".join(text for one in questions for text in (one.answer, *one.options))))
    unused = (number for number in itertools.count(FIRST_NUMBER) if str(number) not in answers)
    numbers: dict[str, str] = {}
    names = []
    for question, image in zip(questions, images, strict=True):
        if not (name := _own_name(question)):
            if image not in numbers:
                numbers[image] = f"number {next(unused)}"
            name = numbers[image]
        names.append(name)
    return names


def _own_name(question: Question) -> str:
    """Return the ``name`` of the annotation; empty if it has none."""
    return " ".join(str(question.meta.get("name", "")).split())[:MAX_NAME_CHARACTERS]


def _needle_text(question: Question, name: str, following: str) -> str:
    """Return what is written on the image of a question: its number if it has no name, and which image follows."""
    own = "" if _own_name(question) else f"This is {name}."
    return f"{own} Next, find the frame of {following}".strip() if following != name else own


def chain_positions(needles: int, frames: int) -> list[int]:
    """Return the frames that ``needles`` images replace, from the first to the last of ``frames``.

    Raises:
        ValueError: there are fewer frames than images.
    """
    if needles > frames:
        raise ValueError(f"a chain has {needles} images, and the video {frames} frames; ask for more frames")
    return [round(number * (frames - 1) / max(needles - 1, 1)) for number in range(needles)]


def write_text(image: np.ndarray, text: str) -> np.ndarray:
    """Write ``text`` in black on white over the lower edge of an image, uint8 (S, S, 3)."""
    side = len(image)
    height = max(round(LINE_SHARE * side), 8)
    lines = textwrap.wrap(text, max(int(side / (LETTER_SHARE * height)), 4))
    drawn = Image.fromarray(image)
    draw, font = ImageDraw.Draw(drawn), ImageFont.load_default(height)
    top = side - round(1.2 * height * len(lines)) - 2
    draw.rectangle((0, top, side, side), fill="white")
    for number, line in enumerate(lines):
        draw.text((2, top + round(1.2 * height * number)), line, fill="black", font=font)
    return np.asarray(drawn)


def _ask(question: Question, text: str) -> Question:
    """Return the question with another text in its last turn."""
    mark = f"{IMAGE_PLACEHOLDER}\n" if IMAGE_PLACEHOLDER in turn_text(question.turns[-1]) else ""
    return dataclasses.replace(question, turns=[*question.turns[:-1], {**question.turns[-1], "value": mark + text}])
