"""Samples of the published annotation files, with small media: the forms and kinds of files of each data set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.rehearsal.media import draw_frames, draw_gif, draw_image, draw_video
from framestream.pipeline.config.data import FOLDER_READERS, EntryConfig

CLIPPED = re.compile(r"tvqa|star-|didemo|youcook2|vript|timeit|ANetRTL")  #: data sets whose samples name clips
LONG = "caption_sharegpt4o-sharegpt4o_3k"  #: the entry with a video of 512 frames
#: containers of data sets that are not published as mp4
CONTAINERS = {"ssv2": "webm", "lsmdc": "avi", "nturgbd": "avi", "youcook2": "mkv", "didemo": "mov", "ANet": "mkv"}
FRAMES = (9, 20)  #: of the two videos of an entry, at 8 a second
FULL_FRAMES = 68  #: of the first video of every eighth entry, which has the 64 frames of stages 3 and 4
LONG_SECONDS = 516  #: at one frame a second
SIZES = ((80, 60), (300, 140), (90, 260))  #: of the three images of an entry
LARGE_SIZE = (1400, 1300)  #: of the first image of every eighth entry: a grid of many tiles
#: names of the frames of a folder
FRAME_NAMES = ("{:05d}.jpg", "frame_{}.jpg", "c01_{:04d}.jpeg", "img_{:05d}.png.jpg")
QUESTIONS = ("What happens in this clip?", "Describe it in detail.", "Which of these is right?\n(A) one\n(B) two")
ANSWER = "A smooth pattern of colors moves slowly to the right, without a pause, until the end."


@dataclass
class PublishedFile:
    """An annotation file and the media it names, by their paths below the entry's root."""

    samples: list[dict[str, Any]]
    media: dict[str, bytes] = field(default_factory=dict)

    def encode(self, name: str) -> bytes:
        """Return the bytes of the file: JSON lines, or one JSON list."""
        if name.endswith(".jsonl"):
            return "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in self.samples).encode()
        return json.dumps(self.samples, ensure_ascii=False).encode()


def draw_file(entry: EntryConfig, number: int, count: int) -> PublishedFile:
    """Draw the annotation file of an entry with ``count`` samples, and its media; ``number`` makes them its own."""
    file = PublishedFile([])
    kind = "video" if entry.media_type == "video" else "text" if entry.media_type == "text" else "image"
    several = entry.media_type == "auto"  # M4-Instruct: several images a dialogue
    named = list(_media(entry, number, kind, file.media))
    for n in range(count):
        sample: dict[str, Any] = {} if n % 5 == 4 else {"id": n if number % 2 else f"{entry.name}-{n}"}
        marks = 0
        if kind == "video":
            sample |= {"video": named[n % len(named)], **_clip(entry, n)}
            marks = 1
        elif several:
            sample["image"] = [named[(n + k) % len(named)] for k in range(2 + n % 3)]
            marks = len(sample["image"])
        elif kind == "image":
            sample["image"] = named[n % len(named)]
            marks = 1
        if "with_duration" in entry.annotation:
            sample["duration"] = 5.0
        sample["conversations"] = _turns(entry, n, marks)
        file.samples.append(sample)
    return file


def _media(entry: EntryConfig, number: int, kind: str, media: dict[str, bytes]) -> Iterator[str]:
    """Yield the paths that samples name, and put the files into ``media``."""
    folder, full = re.sub(r"\W+", "_", entry.name), number % 8 == 0
    if kind == "image":
        for n, size in enumerate(SIZES):
            path = f"{folder}/{'train/' * (n % 2)}{number:03d}_{n}.{'png' if n == 1 else 'jpg'}"
            media[path] = draw_image(path.rpartition(".")[2], number + n, LARGE_SIZE if full and not n else size)
            yield path
    elif kind == "video" and entry.reader in FOLDER_READERS:
        for n, frames in enumerate(FRAMES):
            path = f"{folder}/s{number:02d}_clip_{n:02d}"
            name = FRAME_NAMES[number % 3]
            files = draw_frames(name, number, FULL_FRAMES if full and not n else frames)
            media |= {f"{path}/{name}": data for name, data in files.items()}
            yield path
    elif kind == "video" and entry.reader == "gif":
        for n, frames in enumerate(FRAMES):
            path = f"{folder}/tumblr_{number}{n}.gif"
            media[path] = draw_gif(number, frames)
            yield path
    elif kind == "video":
        extension = next((c for name, c in CONTAINERS.items() if name in entry.name), "mp4")
        for n, frames in enumerate(FRAMES):
            path = f"{folder}/Ab-{number}_{n}.{extension}"
            frames = FULL_FRAMES if full and not n else frames
            long = entry.name == LONG and not n
            media[path] = draw_video(extension, number, LONG_SECONDS, 1) if long else draw_video(extension, n, frames)
            yield path


def _clip(entry: EntryConfig, n: int) -> dict[str, Any]:
    """Return the bounds of a clip: numbers, numbers as text, or only a start."""
    fields: dict[str, Any] = {"video_read_type": entry.reader} if entry.reader != "decord" else {}
    if CLIPPED.search(entry.name) and n % 3:
        fields |= {"start": 0.25, "end": 1.0} if n % 2 else {"start": "0.5"}
    return fields


def _turns(entry: EntryConfig, n: int, marks: int) -> list[dict[str, str]]:
    """Return the turns of a sample: captions have two, questions up to six."""
    question = QUESTIONS[n % len(QUESTIONS)]
    if marks > 1:
        first = " and ".join(["<image>"] * marks) + f"\n{question}"
    elif marks and n % 3 == 1:
        first = f"{question}\n<image>"
    else:
        first = "<image>\n" * marks + question
    turns = [{"from": "human", "value": first}, {"from": "gpt", "value": f"{ANSWER} ({n})"}]
    if "caption" not in entry.name and "blip" not in entry.name and n % 2:
        turns += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "二、三 – nothing more."}]
    return turns
