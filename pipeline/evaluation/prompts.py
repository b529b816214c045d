"""Build generation prompts: packed rows of one dialogue without the answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.intervals import VideoClock
from framestream.pipeline.evaluation.pixel_stream import Encode, read_pixels, read_some_images, stream_pixels
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.collate import MicroStep, PackedSample, collate
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX


class PromptTooLongError(ValueError):
    """A prompt has more tokens than the model takes; one line with the fix."""

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(
            f"the prompt has {tokens:,} tokens, and the limit of the model is {limit:,}; "
            "shorten it or start a new conversation"
        )
        self.tokens, self.limit = tokens, limit


class PromptBuilder:
    """Builds prompts under one manifest, with the preprocessing of training rows.

    Args:
        media_views: views of the media that prompts may use.
    """

    def __init__(self, manifest: Manifest, media_views: MediaViews, chat_template: ChatTemplate) -> None:
        self._media_views, self._chat_template = media_views, chat_template
        self._frames = manifest.frames
        self._limit = manifest.model.language_model.max_position_embeddings

    def encode(self, turns: Sequence[dict], media: Sequence[int]) -> tuple[np.ndarray, list[MediaView]]:
        """Return the ids of the prompt, int32 (n,) with one ``IMAGE_TOKEN_INDEX`` per media item, and the media views.

        Args:
            turns: ``{"from", "value"}``; the last one is the question. They contain one placeholder per media item.
            media: rows of the media table, in order of use.

        Raises:
            ValueError: the placeholders do not fit the media, or a video cannot be sampled.
        """
        views = self._media_views.views(list(media))
        kinds, messages = [view.kind for view in views], [view.message for view in views]
        return self._chat_template.prompt(turns, kinds, messages), views

    def num_tokens(self, turns: Sequence[dict], media: Sequence[int]) -> int:
        """Count the tokens of the prompt, with visual tokens; no media are decoded. Arguments as of :meth:`encode`."""
        return _num_tokens(*self.encode(turns, media))

    def build(
        self,
        turns: Sequence[dict],
        media: Sequence[int],
        key: str = "",
        shuffle: np.random.Generator | None = None,
        encode: Encode | None = None,
    ) -> Batch:
        """Build the prompt as a row of one dialogue; no label is set.

        Args:
            turns, media: as of :meth:`encode`.
            shuffle: draws a random order for the frames of each video. The time message does not change.
            encode: computes the tokens of the media while they are decoded. The row then has ``unit_tokens`` in place
                of pixels, and a few clips are in memory at a time.

        Raises:
            PromptTooLongError: the prompt is too long for the model.
            ValueError: as of :meth:`encode`, or media cannot be decoded.
            OSError: a shard cannot be read.
        """
        ids, views = self.encode(turns, media)
        if (tokens := _num_tokens(ids, views)) >= self._limit:
            raise PromptTooLongError(tokens, self._limit)
        tokens_of_units = None
        if encode is None or not views:
            clips, tiles = read_pixels(self._media_views, views, self._frames, shuffle)
        else:
            tokens_of_units = encode(stream_pixels(self._media_views, views, self._frames, shuffle))
            clips, tiles = read_pixels(self._media_views, [], self._frames)
        sample = PackedSample(key, ids, np.full_like(ids, IGNORE_INDEX), 0.0, views, clips, tiles)
        return dataclasses.replace(collate(MicroStep(), [sample], clips, tiles, []), unit_tokens=tokens_of_units)

    def some_images(self, media: Sequence[int], most: int) -> list[np.ndarray]:
        """Decode at most ``most`` of the images that a prompt shows, evenly spread: uint8 (S, S, 3) each.

        Raises:
            OSError, ValueError: as of :meth:`build`.
        """
        return read_some_images(self._media_views, self._media_views.views(list(media)), self._frames, most)

    def clock(self, media: Sequence[int]) -> VideoClock | None:
        """Return the clock of the only media item if it is a video, else None.

        Raises:
            ValueError: the video cannot be sampled.
        """
        views = self._media_views.views(list(media))
        if [view.kind for view in views] != ["video"]:
            return None
        return VideoClock.of_frames(*self._media_views.frame_times(views[0]))


def _num_tokens(ids: np.ndarray, views: Sequence[MediaView]) -> int:
    return len(ids) - len(views) + sum(view.tokens for view in views)
