"""Evaluation questions: a prompt for the model, the expected answer, and controls with other media."""

from __future__ import annotations

import abc
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.compute as pc

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.intervals import Interval, IntervalError, VideoClock, read_intervals
from framestream.pipeline.evaluation.pixel_stream import Encode
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.storage import ReadOptions
from framestream.pipeline.tokenization.chat_template import (
    IMAGE_PLACEHOLDER,
    ChatTemplate,
    build_chat_template,
    split_last_answer,
    turn_text,
)
from framestream.pipeline.utils.records import load_json

MAX_OPTIONS = 64  #: answers to choose from; each costs a row of the model's cache
MAX_OPTION_CHARACTERS = 2000
MAX_FAMILY_CHARACTERS = 200


class QuestionError(ValueError):
    """Invalid ``options``, ``family`` or ``intervals`` of a question: one line."""


@dataclass(frozen=True, slots=True)
class Question:
    """One dialogue up to its last human turn that has an answer. Earlier turns are context."""

    key: str  #: of the dialogue
    turns: list[dict]
    answer: str  #: the expected answer
    entry: str
    meta: dict[str, Any]  #: fields of the annotation other than conversation and media, without those that are null
    media: Sequence[Any]  #: media of the turns, without those that only later turns use

    @classmethod
    def from_turns(cls, key: str, turns: list[dict], entry: str, meta: dict, media: Sequence[Any]) -> Question:
        """Make the question of a dialogue. A field of ``meta`` that is null is missing, as in the rows of a table.

        Raises:
            QuestionError: its ``options``, its ``family`` or its ``intervals`` are invalid.
            ValueError: no human turn has an answer.
        """
        asked, answer = split_last_answer(turns)
        meta = {name: value for name, value in meta.items() if value is not None}
        if "options" in meta:
            _check_options(meta["options"])
        _check_family(meta.get("family"))
        _check_intervals(meta)
        count = sum(turn_text(turn).count(IMAGE_PLACEHOLDER) for turn in asked)
        return cls(key, asked, answer, entry, meta, list(media)[:count])

    @property
    def text(self) -> str:
        """The last human turn, without image placeholders."""
        return turn_text(self.turns[-1]).replace(IMAGE_PLACEHOLDER, "").strip()

    @property
    def family(self) -> str:
        """The annotation's ``family``, or the name of the entry if it has none."""
        family = self.meta.get("family")
        return " ".join(str("" if family is None else family).split()) or self.entry

    @property
    def options(self) -> list[str]:
        """The annotation's ``options``, which are the answers to choose from; empty if it has none."""
        return [str(option) for option in self.meta.get("options", ())]

    @property
    def intervals(self) -> list[Interval] | None:
        """The annotation's ``intervals``, in seconds of the source; None if it has none."""
        return read_intervals(self.meta["intervals"]) if "intervals" in self.meta else None


def count_rejected(lines: Sequence[str]) -> str:
    """Say how many samples were rejected, and why the first one was."""
    return f"{len(lines):,} rejected, the first: {lines[0]}"


def _check_options(options: Any) -> None:
    """Raise QuestionError unless ``options`` are different answers to choose from."""
    shown = f"options: {str(options)[:60]!r}"
    if not isinstance(options, list) or len(options) < 2:
        raise QuestionError(f"{shown} must be a list of at least two answers")
    if len(options) > MAX_OPTIONS:
        raise QuestionError(f"{shown} are {len(options):,} answers; at most {MAX_OPTIONS} can be compared")
    for option in options:
        if not isinstance(option, (str, int, float)) or isinstance(option, bool):
            raise QuestionError(f"{shown} must be a list of at least two answers, each a text or a number")
        if not str(option).strip() or len(str(option)) > MAX_OPTION_CHARACTERS:
            raise QuestionError(f"{shown}: an answer is empty, or has over {MAX_OPTION_CHARACTERS:,} characters")
    if len({str(option) for option in options}) < len(options):
        raise QuestionError(f"{shown}: an answer is there twice")


def _check_family(family: Any) -> None:
    """Raise QuestionError unless ``family`` is None or can name a group of questions."""
    if family is not None and (not isinstance(family, (str, int, float)) or isinstance(family, bool)):
        raise QuestionError(f"family: {str(family)[:60]!r} must be a text or a number, not {type(family).__name__}")
    if len(str(family)) > MAX_FAMILY_CHARACTERS:
        raise QuestionError(f"family: {str(family)[:60]!r} has over {MAX_FAMILY_CHARACTERS} characters")


def _check_intervals(meta: dict) -> None:
    """Raise QuestionError unless ``intervals`` are missing or valid."""
    try:
        found = read_intervals(meta["intervals"]) if "intervals" in meta else []
    except IntervalError as error:
        raise QuestionError(str(error)) from None
    if found and "options" in meta:
        raise QuestionError("intervals: a question with options is answered by one of them; remove one of the two")


class MediaContents(NamedTuple):
    """What identifies the media of a question. Equal media have equal identities."""

    items: int  #: media items
    asked: frozenset[Hashable]  #: what the question is about
    shown: frozenset[Hashable]  #: all that the media contain


class QuestionSource(Protocol):
    """A sequence of questions with prompts, whatever their media are stored in.

    Attributes:
        rejected: samples that cannot be used as questions, one line each.
    """

    chat_template: ChatTemplate
    rejected: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Question: ...

    def num_answer_tokens(self, i: int) -> int:
        """Count the tokens of the expected answer, without the end token."""

    def prompt_length(self, i: int, media_of: int | None = None) -> int | None:
        """Count the tokens of the prompt, with visual tokens; None if unknown before the media are decoded."""

    def cost_group(self, i: int) -> str:
        """Return the group whose time and memory question ``i`` counts to; a batch has questions of one group."""

    def contents(self, i: int) -> MediaContents:
        """Return what question ``i`` is about and what it shows. Blind, it is shown nothing of what it is about."""

    def prompt(
        self,
        i: int,
        media_of: int | None = None,
        shuffle: np.random.Generator | None = None,
        encode: Encode | None = None,
    ) -> Batch:
        """Build a row of question ``i`` that ends where the answer begins; no label is set.

        Args:
            media_of: the question whose media replace those of question ``i``. The time message is that of the media.
            shuffle: draws a random order for the frames of each video.
            encode: computes the tokens of the media in place of pixels, as of :meth:`.prompts.PromptBuilder.build`.

        Raises:
            ValueError: question ``media_of`` has too few media, or media cannot be decoded.
            OSError: a shard cannot be read.
            MediaError: a file cannot be used.
        """

    def some_images(self, i: int, most: int) -> list[np.ndarray]:
        """Decode at most ``most`` of the images that question ``i`` shows, evenly spread: uint8 (S, S, 3) each.

        Raises:
            ValueError, OSError, MediaError: as of :meth:`prompt`.
        """

    def clock(self, i: int) -> VideoClock | None:
        """Return the clock of the video that question ``i`` shows; None if it shows other media than one video.

        Raises:
            ValueError, OSError, MediaError: as of :meth:`prompt`.
        """


class QuestionList(abc.ABC):
    """Base of question sources: a list of questions, and the reasons why samples were rejected."""

    def __init__(self, chat_template: ChatTemplate) -> None:
        self.chat_template = chat_template
        self.rejected: list[str] = []
        self._questions: list[Question] = []

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, i: int) -> Question:
        return self._questions[i]

    def __iter__(self) -> Iterator[Question]:
        return iter(self._questions)

    def num_answer_tokens(self, i: int) -> int:
        """Count the tokens of the expected answer, without the end token."""
        return len(self.chat_template.answer_ids(self._questions[i].answer)) - 1

    def cost_group(self, i: int) -> str:
        """Return one group for all questions: see :meth:`QuestionSource.cost_group`."""
        return ""

    def contents(self, i: int) -> MediaContents:
        """See :meth:`QuestionSource.contents`. A question is about all of its media."""
        media = self._questions[i].media
        return MediaContents(len(media), frozenset(media), frozenset(media))

    def prompt(
        self,
        i: int,
        media_of: int | None = None,
        shuffle: np.random.Generator | None = None,
        encode: Encode | None = None,
    ) -> Batch:
        """See :meth:`QuestionSource.prompt`."""
        question = self._questions[i]
        prompts, media = self._prompts_of(i, media_of)
        return prompts.build(question.turns, media, question.key, shuffle, encode)

    def some_images(self, i: int, most: int) -> list[np.ndarray]:
        """See :meth:`QuestionSource.some_images`."""
        prompts, media = self._prompts_of(i)
        return prompts.some_images(media, most)

    def clock(self, i: int) -> VideoClock | None:
        """See :meth:`QuestionSource.clock`."""
        prompts, media = self._prompts_of(i)
        return prompts.clock(media)

    @abc.abstractmethod
    def _prompts_of(self, i: int, media_of: int | None = None) -> tuple[PromptBuilder, Sequence[int]]:
        """Return what builds the prompts of question ``i``, and the rows of its media table that they show."""

    def _media(self, i: int, media_of: int | None) -> Sequence[Any]:
        """Return as many media of question ``media_of`` as question ``i`` has; those of ``i`` itself if None."""
        count = len(self._questions[i].media)
        media = self._questions[i if media_of is None else media_of].media
        if len(media) < count:
            raise ValueError(f"question {i} shows {count} media, question {media_of} has {len(media)}")
        return media[:count]


class Questions(QuestionList):
    """The questions of one split of the manifest's shards, in the order of the index.

    Attributes:
        rejected: dialogues with an answer that cannot be used, one line each.

    Raises:
        ShardsError: the shards are missing, do not fit the manifest, or contain no question of the split.
    """

    def __init__(self, manifest: Manifest, split: str = "val") -> None:
        super().__init__(build_chat_template(manifest))
        self.index = Index.open(manifest.shard_address, ReadOptions.from_manifest(manifest.loader))
        self.index.validate_manifest(manifest)
        self._prompts = PromptBuilder(manifest, MediaViews(self.index, manifest), self.chat_template)
        for row in np.flatnonzero(pc.equal(self.index.dialogues["split"], split).to_numpy()).tolist():
            found = self.index.dialogues.slice(row, 1).to_pylist()[0]
            try:
                turns, meta = load_json(found["conversations"]), load_json(found["meta"] or "{}")
                question = Question.from_turns(found["key"], turns, found["entry"], meta, found["media"])
            except QuestionError as error:
                self.rejected.append(f"{found['key']}: {error}")
            except ValueError:
                continue
            else:
                self._questions.append(question)
        if not self._questions:
            nothing = f"{self.index.root}: no samples with an answer found (split: {split})"
            if self.rejected:
                raise ShardsError(f"{nothing}; {count_rejected(self.rejected)}")
            raise ShardsError(f"{nothing}; add an entry with split: {split} and rebuild")

    def prompt_length(self, i: int, media_of: int | None = None) -> int:
        """Count the tokens of the prompt, with visual tokens; no media are decoded."""
        return self._prompts.num_tokens(self._questions[i].turns, self._media(i, media_of))

    def _prompts_of(self, i: int, media_of: int | None = None) -> tuple[PromptBuilder, Sequence[int]]:
        return self._prompts, self._media(i, media_of)
