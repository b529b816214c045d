"""Held-out dialogues of a run's own dataset: rows with labels for a loss, and prompts whose answers can be checked.

A validation asks the same dialogues each time. The manifest's seed chooses them from all dialogues of the split that
have labels, and they keep the order of the dataset.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.preprocessing import FramesConfig
from framestream.pipeline.evaluation.intervals import VideoClock
from framestream.pipeline.evaluation.pixel_stream import read_pixels
from framestream.pipeline.evaluation.questions import Question
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.collate import MicroStep, PackedSample, collate
from framestream.pipeline.planning.dataset import ConcatDataset
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.shards.media_view import MediaView
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.pipeline.utils.records import load_json


class HeldOutRow(NamedTuple):
    """One dialogue as a row whose labeled tokens weigh 1, and the prompt of its question if it has one."""

    row: Batch
    prompt: Batch | None = None
    clock: VideoClock | None = None  #: of a question that shows one video and nothing else


class HeldOutDialogues:
    """At most ``limit`` dialogues of a split, the same for every rank and every run with this seed.

    Args:
        manifest: of the run.
        dataset: the dialogues of all splits that the run reads, of one or several roots.
        limit: number of dialogues.
        split: name of the split.

    Attributes:
        keys: of the dialogues.
        questions: what each asks, None for those without a question that can be asked.

    Raises:
        ShardsError: no dialogue of the split has labels.
    """

    def __init__(self, manifest: Manifest, dataset: ConcatDataset, limit: int, split: str = "val") -> None:
        self._dataset, self._frames = dataset, manifest.frames
        self._positions = manifest.model.language_model.max_position_embeddings
        in_split = np.concatenate([np.empty(0, dtype=bool), *(part.in_split(split) for part in dataset.parts)])
        numbers = np.flatnonzero(in_split & (dataset.num_label_tokens > 0))
        if not len(numbers):
            roots = ", ".join(str(part.index.root) for part in dataset.parts)
            raise ShardsError(
                f"evaluate.every: {roots}: no dialogues to validate with (split: {split}); "
                f"add an entry with split: {split} and rebuild, or remove evaluate.every"
            )
        chosen = np.random.default_rng(manifest.seed).permutation(numbers)[:limit]
        self._numbers: list[int] = np.sort(chosen).tolist()
        self.chat_template = build_chat_template(manifest)
        self.keys = [dataset.key(number) for number in self._numbers]
        self.questions = [self._question(number) for number in self._numbers]

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, i: int) -> HeldOutRow:
        """Decode the media of dialogue ``i`` and build its row and its prompt. It can be called from many threads.

        Raises:
            OSError: a shard cannot be read.
            ValueError: media cannot be decoded, or the prompt is too long for the model.
        """
        number, question = self._numbers[i], self.questions[i]
        views = self._dataset.views(number)
        clips, tiles = read_pixels(self._dataset.media_reader, views, self._frames)
        ids, labels = self._dataset.ids_and_labels(number)
        row = self._collate(i, ids, labels, views, clips, tiles)
        if question is None:
            return HeldOutRow(row)
        shown = views[: len(question.media)]  # later turns may show more
        kinds, messages = [view.kind for view in shown], [view.message for view in shown]
        ids = self.chat_template.prompt(question.turns, kinds, messages)
        clips, tiles = clips[: sum(view.clips for view in shown)], tiles[: sum(view.tiles for view in shown)]
        prompt = self._collate(i, ids, np.full_like(ids, IGNORE_INDEX), shown, clips, tiles)
        if prompt.tokens >= self._positions:
            limit = f"the limit of the model is {self._positions:,}"
            raise ValueError(f"the prompt has {prompt.tokens:,} tokens, and {limit}")
        clock = None
        if kinds == ["video"]:
            clock = VideoClock.of_frames(*self._dataset.parts[shown[0].root].media_views.frame_times(shown[0]))
        return HeldOutRow(row, prompt, clock)

    def _collate(
        self, i: int, ids: np.ndarray, labels: np.ndarray, views: list[MediaView], clips: np.ndarray, tiles: np.ndarray
    ) -> Batch:
        sample = PackedSample(self.keys[i], ids, labels, 1.0, views, clips, tiles)
        return collate(MicroStep(), [sample], clips, tiles, [])

    def _question(self, number: int) -> Question | None:
        """Return the question of a dialogue; None if no turn of it is answered, or its options are invalid."""
        part, row = self._dataset.locate(number)
        found = self._dataset.parts[part].index.dialogues.slice(row, 1).to_pylist()[0]
        try:
            turns, meta = load_json(found["conversations"]), load_json(found["meta"] or "{}")
            return Question.from_turns(found["key"], turns, found["entry"], meta, found["media"])
        except ValueError:
            return None


def empty_row(config: FramesConfig) -> Batch:
    """Return the row without dialogues, which a rank runs while others have one."""
    clips = np.empty((0, config.clip_frames, config.size, config.size, 3), dtype=np.uint8)
    return collate(MicroStep(), [], clips, clips[:, 0], [])
