"""Plug-in for lmms-eval: ``lmms_eval --model framestream --model_args checkpoint=RUN --tasks ...``.

lmms-eval 0.7 finds this file by the entry point of its group ``lmms_eval.models``. Videos are decoded and sampled as in
training. Tasks of the chat kind and of the older, simple kind are answered, also over several rounds, and by
likelihoods. Model arguments:

    checkpoint   a run or a folder of weights
    manifest     the stage's YAML, if the checkpoint has none
    frames       the most frames of a video, instead of the manifest's

Other names are refused. The options that lmms-eval passes to every model (batch_size, device) have no effect. Under
torchrun or accelerate each process has the GPU of its ``LOCAL_RANK``, and lmms-eval shares the questions among them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from tqdm import tqdm

from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile
from framestream.pipeline.tokenization.chat_template import IMAGE_PLACEHOLDER
from framestream.pipeline.utils.arguments import refuse_unknown_arguments
from framestream.trainer.inference.generation import Sampling
from framestream.trainer.inference.predictor import Predictor, resolve_run

MANIFEST = ModelManifest(
    "framestream",
    simple_class_path="framestream.trainer.lmms_plugin.SimpleModel",
    chat_class_path="framestream.trainer.lmms_plugin.ChatModel",
)
MAX_NEW_TOKENS = 16  #: for tasks that do not say, as in the published runs
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


class SimpleModel(lmms):
    """Answers tasks of the simple kind: a text and a list of media."""

    is_simple = True

    @refuse_unknown_arguments
    def __init__(
        self,
        checkpoint: str,
        manifest: str = "",
        frames: int = 0,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        overrides = (f"frames.max={frames}",) if frames else ()
        self._predictor = Predictor(*resolve_run(checkpoint, manifest or None, overrides))
        self._rank, self._world_size = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))

    @property
    def device(self) -> torch.device:
        """The device on which lmms-eval exchanges numbers between processes."""
        return self._predictor.device

    def _with_bar(self, requests: list[Instance]) -> Iterable[Instance]:
        """Show a progress bar of this rank's requests on rank 0."""
        return tqdm(requests, disable=True if self.rank else None)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate the answer to each request."""
        return [self._answer(*self._turn(*self._simple(request))) for request in self._with_bar(requests)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Generate the answers of all rounds of each request."""
        return [self._rounds(request) for request in self._with_bar(requests)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the negative log-likelihood of each answer, and whether it is the greedy one.

        lmms-eval takes losses here, and chooses the option with the least. Likelihoods are of complete answers, with
        the token that ends them.
        """
        losses = []
        for request in self._with_bar(requests):
            text, target, to_visual, number, task, split = request.args
            doc = self.task_dict[task][split][number]
            answer = target(doc) if callable(target) else target
            with _files(to_visual(doc) or []) as files:
                turns = [{"from": "human", "value": _with_marks(text, len(files))}]
                found = self._predictor.loglikelihoods(
                    self._predictor.build_prompt(turns, files), [str(answer).strip()]
                )[0]
                losses.append((-found.logprob, found.is_greedy))
        return losses

    def _simple(self, request: Instance) -> tuple[str, list, dict]:
        text, settings, to_visual, number, task, split = request.args
        return text, to_visual(self.task_dict[task][split][number]) or [], settings

    def _rounds(self, request: Instance) -> list[str]:
        text, settings, to_visual, to_text, number, task, split = request.args
        doc = self.task_dict[task][split][number]
        answers, info, media = [], None, to_visual(doc) or []
        while True:
            answers.append(self._answer(*self._turn(text, media, settings)))
            media, text, last, answers, info = to_text(
                doc, previous_output=list(answers), round_idx=len(answers), previous_round_info=info
            )
            answers = list(answers)
            if last:
                return answers

    @staticmethod
    def _turn(text: str, media: Sequence[Any], settings: dict) -> tuple[list[dict], Sequence[Any], dict]:
        return [{"from": "human", "value": _with_marks(text, len(media))}], media, settings

    def _answer(self, turns: list[dict], media: Sequence[Any], settings: dict) -> str:
        """Generate the answer to the last of ``turns``, cut at the first of the task's ``until`` texts."""
        temperature = settings.get("temperature") or 0.0
        sampling = Sampling(temperature if settings.get("do_sample", True) else 0.0, settings.get("top_p") or 1.0)
        with _files(media) as files:
            prompt = self._predictor.build_prompt(turns, files)
            text = self._predictor.answer([prompt], settings.get("max_new_tokens") or MAX_NEW_TOKENS, sampling)[0]
        until = settings.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text.strip()


class ChatModel(SimpleModel):
    """Answers tasks of the chat kind: messages with texts and media."""

    is_simple = False

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generate the answer to each request."""
        answers = []
        for request in self._with_bar(requests):
            _, to_messages, settings, number, task, split = request.args
            answers.append(self._answer(*_to_turns(to_messages(self.task_dict[task][split][number])), settings))
        return answers

    def _rounds(self, request: Instance) -> list[str]:
        _, to_messages, settings, number, task, split = request.args
        doc = self.task_dict[task][split][number]
        answers: list[str] = []
        info, messages = None, to_messages(doc)
        while True:
            answers.append(self._answer(*_to_turns(messages), settings))
            following = to_messages(
                doc, round_idx=len(answers), previous_output=list(answers), previous_round_info=info
            )
            if not (isinstance(following, tuple) and len(following) == 4):
                return answers
            messages, last, _, info = following
            if last:
                return answers


def _with_marks(text: str, media: int) -> str:
    """Return ``text`` with a mark for each medium; they are put before a text that has another number of marks."""
    if text.count(IMAGE_PLACEHOLDER) == media:
        return text
    return f"{IMAGE_PLACEHOLDER}\n" * media + text.replace(IMAGE_PLACEHOLDER, "")


def _to_turns(messages: Sequence[dict]) -> tuple[list[dict], list[Any]]:
    """Convert messages to our turns, and list the media that they show."""
    turns, media = [], []
    for message in messages:
        content = message["content"]
        text = ""
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                text += part["text"].replace(IMAGE_PLACEHOLDER, "")
            elif part["type"] in ("image", "video"):
                media.append((part["url"], part.get("start_time"), part.get("end_time")))
                text += f"{IMAGE_PLACEHOLDER}\n"
            else:
                raise ValueError(f"a message contains {part['type']}, which framestream's models do not take")
        turns.append({"from": ROLES[message["role"]], "value": text})
    return turns, media


@contextlib.contextmanager
def _files(media: Sequence[Any]) -> Iterator[list[MediaFile]]:
    """Yield a task's media as files: paths, (path, start, end), or images, which are written to a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, item in enumerate(media):
            medium, start, end = item if isinstance(item, tuple) else (item, None, None)
            if isinstance(medium, PIL.Image.Image):
                path = Path(folder) / f"{number}.png"
                medium.convert("RGB").save(path)
                files.append(MediaFile(path, reader=IMAGE_READER))
            elif isinstance(medium, (str, Path)):
                files.append(MediaFile(medium, start, end))
            else:
                raise TypeError(f"a medium is {type(medium).__name__}; framestream's models take paths and images")
        yield files
