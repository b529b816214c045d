"""Held-out dialogues as questions: a prompt for the model, the answer it should give, and controls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.storage import ReadOptions
from framestream.pipeline.tokenization.chat_template import MARK, build_chat_template, question_and_answer, text_of


class OptionsError(ValueError):
    """``options`` that cannot be chosen from: one line."""


@dataclass(frozen=True, slots=True)
class Question:
    """One dialogue up to its last human turn that is answered; earlier turns are context."""

    key: str  #: of the dialogue
    turns: list[dict]
    answer: str  #: that is expected
    entry: str
    meta: dict[str, Any]  #: what the annotation says beside conversation and media
    media: Sequence[Any]  #: of the turns; further media come after the question

    @classmethod
    def of(cls, key: str, turns: list[dict], entry: str, meta: dict, media: Sequence[Any]) -> Question:
        """The question of a dialogue.

        Raises:
            OptionsError: it has ``options`` that are none.
            ValueError: nothing is answered.
        """
        asked, answer = question_and_answer(turns)
        if "options" in meta and not _can_be_chosen_from(meta["options"]):
            raise OptionsError(f"options: {str(meta['options'])[:60]!r} is no list of at least two answers")
        marks = sum(text_of(turn).count(MARK) for turn in asked)
        return cls(key, asked, answer, entry, meta, list(media)[:marks])

    @property
    def text(self) -> str:
        """What is asked, without media marks."""
        return text_of(self.turns[-1]).replace(MARK, "").strip()

    @property
    def family(self) -> str:
        """``family`` of the annotation's own fields, else the entry's name."""
        return str(self.meta.get("family") or self.entry)

    @property
    def options(self) -> list[str]:
        """``options`` of the annotation's own fields: the answers to choose from; empty where it has none."""
        return [str(option) for option in self.meta.get("options", ())]


def _can_be_chosen_from(options: Any) -> bool:
    return isinstance(options, list) and len(options) > 1 and not any(isinstance(o, (dict, list)) for o in options)


class Questions:
    """The answered dialogues of one split of the manifest's shards, in the order of the index.

    Attributes:
        refused: answered dialogues that cannot be asked, one line each.

    Raises:
        ShardsError: the shards are not there or do not fit, or hold no answered dialogue of the split.
    """

    def __init__(self, manifest: Manifest, split: str = "val") -> None:
        self.chat_template = build_chat_template(manifest)
        self.index = Index.open(manifest.shard_address, ReadOptions.from_manifest(manifest.loader))
        self.index.validate_manifest(manifest)
        self._prompts = PromptBuilder(manifest, MediaViews(self.index, manifest), self.chat_template)
        self._list: list[Question] = []
        self.rejected: list[str] = []
        for row in np.flatnonzero(pc.equal(self.index.dialogues["split"], split).to_numpy()).tolist():
            found = self.index.dialogues.slice(row, 1).to_pylist()[0]
            turns, meta = json.loads(found["conversations"]), json.loads(found["meta"] or "{}")
            try:
                self._list.append(Question.of(found["key"], turns, found["entry"], meta, found["media"]))
            except OptionsError as error:
                self.rejected.append(f"{found['key']}: {error}")
            except ValueError:
                continue
        if not self._list:
            raise ShardsError(f"{self.index.root}: no answered dialogue of split {split}; add such an entry and build")

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, i: int) -> Question:
        return self._list[i]

    def answer_tokens(self, i: int) -> int:
        """Tokens of the expected answer, without the one that ends it."""
        return len(self.chat_template.answer_ids(self._list[i].answer)) - 1

    def prompt_length(self, i: int, media_of: int | None = None) -> int:
        """Tokens of the prompt, visual ones included; nothing is decoded."""
        return self._prompts.tokens(self._list[i].turns, self._media(i, media_of))

    def prompt(self, i: int, media_of: int | None = None, shuffle: np.random.Generator | None = None) -> Batch:
        """Question ``i`` as a row that ends where the answer begins; no label is set.

        Args:
            media_of: the question whose media are shown instead of its own; the time message is of those shown.
            shuffle: draws another order for the frames of each video.

        Raises:
            ValueError: the other question has fewer media than this one shows, or media cannot be decoded.
            OSError: a shard cannot be read.
        """
        return self._prompts.build(self._list[i].turns, self._media(i, media_of), self._list[i].key, shuffle)

    def _media(self, i: int, media_of: int | None) -> Sequence[Any]:
        shown, media = len(self._list[i].media), self._list[i if media_of is None else media_of].media
        if len(media) < shown:
            raise ValueError(f"question {i} shows {shown} media, question {media_of} has {len(media)}")
        return media[:shown]
