"""lmms-eval asks our models: ``lmms_eval --model framestream --model_args checkpoint=RUN --tasks ...``.

lmms-eval 0.7 finds this file by the entry point of its group ``lmms_eval.models``. Videos are decoded and sampled as in
training; tasks of the chat kind and of the older, simple kind are answered, several rounds and likelihoods too. Model
arguments: ``checkpoint``, a run or a folder of weights; ``manifest``, where that has none; ``frames``, the most frames
of a video, in place of the manifest's.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from framestream.pipeline.tokenization.chat_template import MARK
from framestream.trainer.inference.generate import Sampling
from framestream.trainer.inference.predictor import Predictor, resolve_run

MANIFEST = ModelManifest(
    "framestream",
    simple_class_path="framestream.trainer.lmms_plugin.SimpleModel",
    chat_class_path="framestream.trainer.lmms_plugin.ChatModel",
)
NEW_TOKENS = 16  #: where a task does not say, as in the published runs
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


class SimpleModel(lmms):
    """Answers tasks of the simple kind: a text and a list of media."""

    is_simple = True

    def __init__(self, checkpoint: str, manifest: str = "", frames: int = 0, **_: Any) -> None:
        super().__init__()
        overrides = (f"frames.max={frames}",) if frames else ()
        self._asker = Predictor(*resolve_run(checkpoint, manifest or None, overrides))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._one(*self._turn(*self._simple(request))) for request in tqdm(requests, disable=None)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        return [self._rounds(request) for request in tqdm(requests, disable=None)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Negative logarithms: lmms-eval takes losses here, and the option of the least one. Of whole answers, so with
        the token that ends them."""
        found = []
        for request in tqdm(requests, disable=None):
            text, target, to_visual, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            answer = target(doc) if callable(target) else target
            with _files(to_visual(doc) or []) as files:
                prompt = self._asker.prompt([{"from": "human", "value": _marked(text, len(files))}], files)
                likelihood = self._asker.likelihoods(prompt, [str(answer).strip()])[0]
                found.append((-likelihood.log, likelihood.greedy))
        return found

    def _simple(self, request: Instance) -> tuple[str, list, dict]:
        text, settings, to_visual, number, task, split = request.args
        return text, to_visual(self.task_dict[task][split][number]) or [], settings

    def _rounds(self, request: Instance) -> list[str]:
        text, settings, to_visual, to_text, number, task, split = request.args
        doc = self.task_dict[task][split][number]
        said, info, media = [], None, to_visual(doc) or []
        while True:
            said.append(self._one(*self._turn(text, media, settings)))
            media, text, last, said, info = to_text(
                doc, previous_output=list(said), round_idx=len(said), previous_round_info=info
            )
            said = list(said)
            if last:
                return said

    @staticmethod
    def _turn(text: str, media: Sequence[Any], settings: dict) -> tuple[list[dict], Sequence[Any], dict]:
        return [{"from": "human", "value": _marked(text, len(media))}], media, settings

    def _one(self, turns: list[dict], media: Sequence[Any], settings: dict) -> str:
        """The answer to the last of ``turns``, up to where the task wants it to end."""
        heat = settings.get("temperature") or 0.0
        sampling = Sampling(heat if settings.get("do_sample", True) else 0.0, settings.get("top_p") or 1.0)
        with _files(media) as files:
            prompt = self._asker.prompt(turns, files)
            text = self._asker.answer([prompt], settings.get("max_new_tokens") or NEW_TOKENS, sampling)[0]
        until = settings.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text.strip()


class ChatModel(SimpleModel):
    """Answers tasks of the chat kind: messages with texts and media."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = []
        for request in tqdm(requests, disable=None):
            _, to_messages, settings, number, task, split = request.args
            answers.append(self._one(*_turns(to_messages(self.task_dict[task][split][number])), settings))
        return answers

    def _rounds(self, request: Instance) -> list[str]:
        _, to_messages, settings, number, task, split = request.args
        doc = self.task_dict[task][split][number]
        said, info, messages = [], None, to_messages(doc)
        while True:
            said.append(self._one(*_turns(messages), settings))
            following = to_messages(doc, round_idx=len(said), previous_output=list(said), previous_round_info=info)
            if not (isinstance(following, tuple) and len(following) == 4):
                return said
            messages, last, _, info = following
            if last:
                return said


def _marked(text: str, media: int) -> str:
    """``text`` with a mark for each medium, before it where it has none."""
    return text if text.count(MARK) == media else f"{MARK}\n" * media + text.replace(MARK, "")


def _turns(messages: Sequence[dict]) -> tuple[list[dict], list[Any]]:
    """Messages as our turns, and the media that they show."""
    turns, media = [], []
    for message in messages:
        content = message["content"]
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"].replace(MARK, "")
            elif part["type"] in ("image", "video"):
                media.append((part["url"], part.get("start_time"), part.get("end_time")))
                text += f"{MARK}\n"
            else:
                raise ValueError(f"a message holds {part['type']}, which framestream's models do not take")
        turns.append({"from": ROLES[message["role"]], "value": text})
    return turns, media


@contextlib.contextmanager
def _files(media: Sequence[Any]) -> Iterator[list[MediaFile]]:
    """Media of a task as files: paths, (path, start, end), or pictures, which are written for a while."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, medium in enumerate(media):
            medium, start, end = medium if isinstance(medium, tuple) else (medium, None, None)
            if isinstance(medium, PIL.Image.Image):
                path = Path(folder) / f"{number}.png"
                medium.convert("RGB").save(path)
                files.append(MediaFile(path, reader=IMAGE_READER))
            elif isinstance(medium, (str, Path)):
                files.append(MediaFile(medium, start, end))
            else:
                raise TypeError(f"a medium is {type(medium).__name__}; framestream's models take paths and pictures")
        yield files
