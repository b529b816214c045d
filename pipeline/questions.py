"""Held-out dialogues as questions: a prompt for the model, the answer it should give, and blind variants."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.compute as pc

from pipeline.batch import Batch
from pipeline.conversation import MARK, conversation_of, question_and_answer, text_of
from pipeline.index import Index, ShardsError
from pipeline.manifest import Manifest
from pipeline.prompts import Prompts
from pipeline.storage import Reading
from pipeline.visuals import Visuals


class Questions:
    """The answered dialogues of one split, numbered from 0 in the order of the index.

    The question of a dialogue is its last human turn that is answered; earlier turns are its context.
    """

    def __init__(self, manifest: Manifest, split: str = "val") -> None:
        self.index = Index.open(manifest.shard_place, Reading.of(manifest.loader))
        self.index.check(manifest)
        self._prompts = Prompts(manifest, Visuals(self.index, manifest), conversation_of(manifest))
        self._rows: list[int] = []
        self._asked: list[tuple[list[dict], str]] = []
        for row in np.flatnonzero(pc.equal(self.index.dialogues["split"], split).to_numpy()).tolist():
            try:
                asked = question_and_answer(json.loads(self._value("conversations", row)))
            except ValueError:
                continue
            self._rows.append(row)
            self._asked.append(asked)
        if not self._rows:
            raise ShardsError(f"{self.index.root}: no answered dialogue of split {split}; add such an entry and build")

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, i: int) -> str:
        """Key of the dialogue."""
        return self._value("key", self._rows[i])

    def question(self, i: int) -> str:
        """The question's text, without media marks."""
        return text_of(self._asked[i][0][-1]).replace(MARK, "").strip()

    def answer(self, i: int) -> str:
        """The expected answer."""
        return self._asked[i][1]

    def family(self, i: int) -> str:
        """``family`` of the annotation's own fields, else the entry's name."""
        named = self.meta(i).get("family")
        return str(named) if named else self._value("entry", self._rows[i])

    def meta(self, i: int) -> dict:
        """What the annotation says beside conversation and media."""
        return json.loads(self._value("meta", self._rows[i]) or "{}")

    def shown(self, i: int) -> int:
        """How many media the question shows, with its context."""
        media = self._value("media", self._rows[i])
        return min(len(media), sum(text_of(turn).count(MARK) for turn in self._asked[i][0]))

    def length(self, i: int, media_of: int | None = None) -> int:
        """Tokens of the prompt, visual ones included; nothing is decoded."""
        ids, views = self._prompts.ids(self._asked[i][0], self._media(i, media_of))
        return len(ids) - len(views) + sum(view.tokens for view in views)

    def prompt(self, i: int, media_of: int | None = None) -> Batch:
        """Question ``i`` as a row that ends where the answer begins; no label is set.

        Args:
            media_of: the question whose media are shown instead of its own; the time message is of those shown.

        Raises:
            ValueError: the other question has fewer media than this one shows, or media cannot be decoded.
            OSError: a shard cannot be read.
        """
        return self._prompts.row(self._asked[i][0], self._media(i, media_of), self.key(i))

    def _media(self, i: int, media_of: int | None) -> list[int]:
        shown = self.shown(i)  # further media come after the question
        media = self._value("media", self._rows[i if media_of is None else media_of])
        if len(media) < shown:
            raise ValueError(f"question {i} shows {shown} media, question {media_of} has {len(media)}")
        return media[:shown]

    def _value(self, name: str, row: int):
        return self.index.dialogues[name][row].as_py()
