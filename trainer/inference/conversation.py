"""Ask a model questions about media files, in text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from framestream.pipeline.evaluation.pixel_stream import Pixels, even_positions
from framestream.pipeline.shards.memory_index import MediaFile
from framestream.pipeline.tokenization.chat_template import IMAGE_PLACEHOLDER, escape_placeholders
from framestream.trainer.inference.chat_session import ChatSession, stream_text
from framestream.trainer.inference.generation import GREEDY, Sampling
from framestream.trainer.inference.predictor import Predictor

MAX_IMAGES = 512  #: of the model's input that are returned to be looked at


class Conversation:
    """A conversation about ``files``; each question is answered with the earlier turns as context.

    Args:
        predictor: the model that answers.
        files: videos and images, shown before the first question in this order.
        max_new_tokens: longest answer.
        sampling: how tokens are chosen.
    """

    def __init__(
        self,
        predictor: Predictor,
        files: Sequence[MediaFile] = (),
        max_new_tokens: int = 512,
        sampling: Sampling = GREEDY,
    ) -> None:
        self._predictor, self._files = predictor, list(files)
        self._session = ChatSession(predictor.model, max_new_tokens, predictor.chat_template.end_ids, sampling)
        self._turns: list[dict[str, str]] = []
        self._tokens: torch.Tensor | None = None  # of all media, after the first question

    def ask(self, question: str) -> Iterator[str]:
        """Yield the answer piece by piece; the turn is remembered once the iterator is exhausted.

        ``<image>`` and control tokens in the question are ordinary characters.

        Raises:
            MediaError: a file cannot be used; one line that names it.
            ValueError: the conversation has more tokens than the model takes.
        """
        marks = "" if self._turns else f"{IMAGE_PLACEHOLDER}\n" * len(self._files)
        turns = [*self._turns, {"from": "human", "value": marks + escape_placeholders(question)}]
        prompt = self._predictor.build_prompt(turns, self._files, encode=self._encode)
        answer = ""
        for piece in stream_text(self._session.answer(prompt), self._predictor.decode):
            answer += piece
            yield piece
        self._turns = [*turns, {"from": "gpt", "value": escape_placeholders(answer)}]

    def _encode(self, pixels: Iterable[Pixels]) -> torch.Tensor:
        """Encode the media at the first question. Later ones read no pixels."""
        if self._tokens is None:
            self._tokens = self._predictor.encode(pixels)
        return self._tokens

    def input_images(self) -> tuple[list[np.ndarray], list[str]]:
        """Return the images that the model sees, and a caption for each; :data:`MAX_IMAGES`, evenly spread, of more.

        Images are uint8 (S, S, 3): the frames of videos, then the tiles of images. A frame's caption is its second in
        the video, a tile's is the file's name with the number of the tile.

        Raises:
            MediaError: a file cannot be used; one line that names it.
        """
        views = self._predictor.media_views(self._files)
        times = [self._predictor.frame_times(self._files, view) for view in views if view.kind == "video"]
        captions = [f"{second:.1f} s" for seconds in times for second in seconds]
        for view, file in zip(views, self._files, strict=True):
            captions += [f"{Path(file.path).name} {tile + 1}/{view.tiles}" for tile in range(view.tiles)]
        images = self._predictor.some_images(self._files, MAX_IMAGES)
        return images, [captions[position] for position in even_positions(len(captions), MAX_IMAGES)]
