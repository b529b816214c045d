"""Build generation prompts: packed rows of one dialogue without the answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.loading.collate import MicroStep, PackedSample, collate
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX


class PromptBuilder:
    """Builds prompts under one manifest, with the preprocessing of training rows.

    Args:
        media_views: views of the media that prompts may use.
    """

    def __init__(self, manifest: Manifest, media_views: MediaViews, chat_template: ChatTemplate) -> None:
        self._media_views, self._chat_template = media_views, chat_template
        self._size, self._clip_frames = manifest.frames.size, manifest.frames.clip_frames
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
    ) -> Batch:
        """Build the prompt as a row of one dialogue; no label is set.

        Args:
            turns, media: as of :meth:`encode`.
            shuffle: draws a random order for the frames of each video. The time message does not change.

        Raises:
            ValueError: as of :meth:`encode`, the prompt is too long for the model, or media cannot be decoded.
            OSError: a shard cannot be read.
        """
        ids, views = self.encode(turns, media)
        if (tokens := _num_tokens(ids, views)) >= self._limit:
            raise ValueError(
                f"the prompt has {tokens:,} tokens, and the limit of the model is {self._limit:,}; "
                "shorten it or start a new conversation"
            )
        clips, tiles = self._read_media(views, shuffle)
        sample = PackedSample(key, ids, np.full_like(ids, IGNORE_INDEX), 0.0, views, clips, tiles)
        return collate(MicroStep(), [sample], clips, tiles, [])

    def _read_media(
        self, views: Sequence[MediaView], shuffle: np.random.Generator | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Decode clips, uint8 (N_c, T, S, S, 3), and image tiles, uint8 (N_s, S, S, 3), in the order of ``views``."""
        side = self._size
        clips = np.empty((sum(view.clips for view in views), self._clip_frames, side, side, 3), dtype=np.uint8)
        tiles = np.empty((sum(view.tiles for view in views), side, side, 3), dtype=np.uint8)
        all_frames, frame, tile = clips.reshape(-1, side, side, 3), 0, 0
        for view in views:
            if view.kind == "video":
                frames = all_frames[frame : frame + len(view.frame_indices)]
                self._media_views.read_frames(view, 0, frames)
                if shuffle is not None:
                    frames[:] = frames[shuffle.permutation(len(frames))]
            else:
                self._media_views.read_image(view, tiles[tile : tile + view.tiles])
            frame, tile = frame + len(view.frame_indices), tile + view.tiles
        return clips, tiles


def _num_tokens(ids: np.ndarray, views: Sequence[MediaView]) -> int:
    return len(ids) - len(views) + sum(view.tokens for view in views)
