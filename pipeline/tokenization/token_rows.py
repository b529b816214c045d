"""Rows of the token cache: ids, labels and lengths of a range of dialogues."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate, TokenSegments
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX
from framestream.pipeline.tokenization.token_files import SCHEMA

CHUNK = 1024  #: dialogues that are tokenized in one call and form one record batch


class DialogueTokenizer:
    """Makes the rows of any range of dialogues of one index.

    It can be pickled: another process of this machine maps the index again, and has a copy of the tokenizer.

    Args:
        index: of the dialogues.
        chat_template: from turns to ids and labels.
        media_views: the media of the index under the same manifest.
        fetch: as of :meth:`ChatTemplate.encode`.
    """

    def __init__(self, index: Index, chat_template: ChatTemplate, media_views: MediaViews, fetch: int) -> None:
        self._index, self._chat_template, self._media_views, self._fetch = index, chat_template, media_views, fetch

    def __call__(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """Yield the rows of dialogues ``start`` to ``stop``, ``CHUNK`` at a time."""
        columns = self._index.dialogues.select(["media", "entry", "conversations"])
        for first in range(start, stop, CHUNK):
            chunk = columns.slice(first, min(CHUNK, stop - first))
            dialogues = zip(*(column.to_pylist() for column in chunk.columns), strict=True)
            prepared = [self._prepare(media, entry, turns) for media, entry, turns in dialogues]
            encoded = self._chat_template.tokenize([[] if error else segments for segments, _, error in prepared])
            rows = [
                self._row(ids, labels, views, error)
                for (ids, labels), (_, views, error) in zip(encoded, prepared, strict=True)
            ]
            yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
        self._index.drop_pages()

    def _prepare(self, media: list[int], entry: str, turns: str) -> tuple[TokenSegments, list[MediaView], str]:
        """Return the segments and media views of a dialogue, and the error if it cannot be used."""
        try:
            views = self._media_views.views(media, entry)
            kinds, messages = [view.kind for view in views], [view.message for view in views]
            return self._chat_template.segments(json.loads(turns), kinds, messages, self._fetch), views, ""
        except ValueError as error:
            return [], [], str(error)

    def _row(self, ids: np.ndarray, labels: np.ndarray, views: list[MediaView], error: str) -> dict:
        if not error:
            try:
                self._chat_template.check_placeholders(ids, len(views))
            except ValueError as mismatch:
                error = str(mismatch)
        if error:
            return {"ids": [], "labels": [], "length": 0, "clips": 0, "tiles": 0, "learned": 0, "error": error}
        labels[:1] = IGNORE_INDEX
        return {
            "ids": ids,
            "labels": labels,
            "length": len(ids) - len(views) + sum(view.tokens for view in views),
            "clips": sum(view.clips for view in views),
            "tiles": sum(view.tiles for view in views),
            "learned": int((labels != IGNORE_INDEX).sum()),
            "error": "",
        }
