"""Questions as rows that end where the answer begins."""

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
    """Makes rows under one manifest, exactly as the loader makes those that are trained on.

    Args:
        visuals: whose media are shown.
    """

    def __init__(self, manifest: Manifest, visuals: MediaViews, conversation: ChatTemplate) -> None:
        self._visuals, self._conversation = visuals, conversation
        self._size, self._clip = manifest.frames.size, manifest.frames.clip_frames
        self._group_clips = manifest.model.vision_tower.group_clips
        self._most = manifest.model.language_model.max_position_embeddings

    def encode(self, turns: Sequence[dict], media: Sequence[int]) -> tuple[np.ndarray, list[MediaView]]:
        """Ids of the prompt, int32 (n,) with one ``IMAGE`` for each medium, and what is shown of each.

        Args:
            turns: ``{"from", "value"}``, the last one the question, with a mark for each medium.
            media: rows of the media table, in order of use.

        Raises:
            ValueError: marks and media do not fit, or a video cannot be sampled.
        """
        views = self._visuals.views(list(media))
        kinds, messages = [view.kind for view in views], [view.message for view in views]
        return self._conversation.prompt(turns, kinds, messages), views

    def tokens(self, turns: Sequence[dict], media: Sequence[int]) -> int:
        """Tokens of the prompt, visual ones included; nothing is decoded. Arguments and errors of :meth:`ids`."""
        return _tokens(*self.encode(turns, media))

    def build(
        self,
        turns: Sequence[dict],
        media: Sequence[int],
        key: str = "",
        shuffle: np.random.Generator | None = None,
    ) -> Batch:
        """The prompt as a row of one dialogue; no label is set.

        Args:
            turns, media: as of :meth:`ids`.
            shuffle: draws another order for the frames of each video; what is said about them stays.

        Raises:
            ValueError: as of :meth:`ids`, the model takes fewer tokens, or media cannot be decoded.
            OSError: a shard cannot be read.
        """
        ids, views = self.encode(turns, media)
        if (tokens := _tokens(ids, views)) >= self._most:
            raise ValueError(
                f"{tokens:,} tokens were asked, and the model takes {self._most:,}; ask less, or start anew"
            )
        side, clip = self._size, self._clip
        clips = np.empty((sum(view.clips for view in views), clip, side, side, 3), dtype=np.uint8)
        stills = np.empty((sum(view.tiles for view in views), side, side, 3), dtype=np.uint8)
        frames, frame, tile = clips.reshape(-1, side, side, 3), 0, 0
        for view in views:
            if view.kind == "video":
                shown = frames[frame : frame + len(view.frame_indices)]
                self._visuals.read_frames(view, 0, shown)
                if shuffle is not None:
                    shown[:] = shown[shuffle.permutation(len(shown))]
            else:
                self._visuals.read_image(view, stills[tile : tile + view.tiles])
            frame, tile = frame + len(view.frame_indices), tile + view.tiles
        groups = max(1, -(-(len(clips) + len(stills)) // self._group_clips))
        piece = PackedSample(key, ids, np.full_like(ids, IGNORE_INDEX), 0.0, views, clips, stills)
        return collate(MicroStep(groups=groups), [piece], clips, stills, [])


def _tokens(ids: np.ndarray, views: Sequence[MediaView]) -> int:
    return len(ids) - len(views) + sum(view.tokens for view in views)
