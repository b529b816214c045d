"""Held-out dialogues as questions: a prompt for the model, the answer it should give, and blind variants."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.compute as pc

from pipeline.batch import IGNORE, Batch
from pipeline.conversation import MARK, conversation_of, question_and_answer, text_of
from pipeline.index import Index, ShardsError
from pipeline.manifest import Manifest
from pipeline.rows import Piece, Place, assemble
from pipeline.storage import Reading
from pipeline.visuals import View, Visuals


class Questions:
    """The answered dialogues of one split, numbered from 0 in the order of the index.

    The question of a dialogue is its last human turn that is answered; earlier turns are its context.
    """

    def __init__(self, manifest: Manifest, split: str = "val") -> None:
        self.index = Index.open(manifest.shard_place, Reading.of(manifest.loader))
        self.index.check(manifest)
        self._visuals = Visuals(self.index, manifest)
        self._conversation = conversation_of(manifest)
        self._frames, self._group_clips = manifest.frames, manifest.model.vision_tower.group_clips
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
        ids, views = self._prompt(i, media_of)
        return len(ids) - len(views) + sum(view.tokens for view in views)

    def prompt(self, i: int, media_of: int | None = None) -> Batch:
        """Question ``i`` as a row that ends where the answer begins; no label is set.

        Args:
            media_of: the question whose media are shown instead of its own; the time message is of those shown.

        Raises:
            ValueError: the other question has fewer media than this one shows, or media cannot be decoded.
            OSError: a shard cannot be read.
        """
        ids, views = self._prompt(i, media_of)
        side, clip = self._frames.size, self._frames.clip_frames
        clips = np.empty((sum(view.clips for view in views), clip, side, side, 3), dtype=np.uint8)
        stills = np.empty((sum(view.tiles for view in views), side, side, 3), dtype=np.uint8)
        frames, frame, tile = clips.reshape(-1, side, side, 3), 0, 0
        for view in views:
            if view.kind == "video":
                self._visuals.read_frames(view, 0, frames[frame : frame + len(view.places)])
            else:
                self._visuals.read_still(view, stills[tile : tile + view.tiles])
            frame, tile = frame + len(view.places), tile + view.tiles
        groups = max(1, -(-(len(clips) + len(stills)) // self._group_clips))
        piece = Piece(self.key(i), ids, np.full_like(ids, IGNORE), 0.0, views, clips, stills)
        return assemble(Place(groups=groups), [piece], clips, stills, [])

    def _prompt(self, i: int, media_of: int | None) -> tuple[np.ndarray, list[View]]:
        turns, shown = self._asked[i][0], self.shown(i)  # further media come after the question
        media = self._value("media", self._rows[i if media_of is None else media_of])
        if len(media) < shown:
            raise ValueError(f"question {i} shows {shown} media, question {media_of} has {len(media)}")
        views = self._visuals.views(media[:shown])
        kinds, messages = [view.kind for view in views], [view.message for view in views]
        return self._conversation.prompt(turns, kinds, messages), views

    def _value(self, name: str, row: int):
        return self.index.dialogues[name][row].as_py()
