"""Needle in a haystack: questions about an image that replaces one frame of a long video.

As in V-NIAH (Long Context Transfer from Language to Vision, arXiv 2406.16852): a video is sampled at a number of
frames, the frame at a given depth is replaced by an image, and the model is asked about the image.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.evaluation.questions import Question, QuestionList
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.image import read_image
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg
from framestream.pipeline.media.resize import resize
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, build_memory_index


class HaystackCell(NamedTuple):
    """One cell of a heat map."""

    frames: int  #: frames of the video
    depth: float  #: position of the needle, in percent of the way from the first to the last frame

    @property
    def name(self) -> str:
        """The family of its questions."""
        return f"{self.frames} frames, {self.depth:g} % deep"

    @property
    def position(self) -> int:
        """The number of the frame that the needle replaces, from 0."""
        return round(self.depth / 100 * (self.frames - 1))


class HaystackSample(NamedTuple):
    """The media of a question: a video that contains a needle."""

    cell: HaystackCell
    video: int  #: number of the video
    needle: Path  #: file of the image


class Haystack(QuestionList):
    """The questions of an annotation file about images, repeated for every number of frames and every depth.

    The images are inserted into ``videos`` in turn. Frames are sampled by ``middle``. They are resized, encoded and
    described as the manifest says.

    Args:
        needles: an annotation file whose questions are about one image each, below ``root``.
        videos: files to insert them into; each must have as many frames as the largest of ``frames``.
        frames: numbers of frames, multiples of the manifest's ``frames.clip_frames``.
        depths: percentages.

    Attributes:
        cells: by the family of their questions.

    Raises:
        AnnotationFileError, ShardsError: the needles cannot be read, or none of them can be used.
        MediaError: none of the videos can be used; one line that names the first. If others can, the ``rejected`` lines
            name it.
    """

    def __init__(
        self,
        manifest: Manifest,
        needles: str | Path,
        root: str | Path,
        videos: Sequence[str | Path],
        frames: Sequence[int],
        depths: Sequence[float],
    ) -> None:
        source = FileQuestions(manifest, needles, root)
        super().__init__(source.chat_template)
        self.rejected = source.rejected
        questions: list[Question] = []
        for question in source:
            if [file.reader for file in question.media] == [IMAGE_READER]:
                questions.append(question)
            else:
                self.rejected.append(f"{needles}: {question.key}: needles are questions about one image")
        if not questions:
            raise ShardsError(f"{needles}: no question about one image found; give an image and a question per needle")
        self._manifests = {count: _with_frames(manifest, count) for count in frames}
        self._videos = self._open_videos(videos, max(frames))
        self.cells = {cell.name: cell for cell in (HaystackCell(count, depth) for count in frames for depth in depths)}
        self._questions = [
            dataclasses.replace(
                question,
                key=f"{question.key}, {name}",
                meta={**question.meta, "family": name},
                media=[HaystackSample(cell, number % len(self._videos), question.media[0].path)],
            )
            for name, cell in self.cells.items()
            for number, question in enumerate(questions)
        ]

    def prompt_length(self, i: int, media_of: int | None = None) -> int:
        """Count the tokens of the prompt, with visual tokens; no media are decoded."""
        (sample,) = self._media(i, media_of)
        return self._prompts(sample).num_tokens(self._questions[i].turns, [0])

    def prompt(self, i: int, media_of: int | None = None, shuffle: np.random.Generator | None = None) -> Batch:
        """See :meth:`framestream.pipeline.evaluation.questions.QuestionSource.prompt`."""
        (sample,) = self._media(i, media_of)
        return self._prompts(sample).build(self._questions[i].turns, [0], self._questions[i].key, shuffle)

    def _open_videos(self, videos: Sequence[str | Path], count: int) -> list[Index]:
        """Decode the videos. Those that cannot be used are ``rejected``, unless there are no others."""
        found, errors = [], []
        for video in videos:
            try:
                found.append(_open_video(video, self._manifests[count], count))
            except (MediaError, OSError, ValueError) as error:
                errors.append(error)
                reason = " ".join(str(error).split())
                self.rejected.append(f"{video}: left out, other videos take its needles: {reason}")
        if not found:
            raise errors[0]
        return found

    def _prompts(self, sample: HaystackSample) -> PromptBuilder:
        manifest = self._manifests[sample.cell.frames]
        media_views = _NeedleViews(self._videos[sample.video], manifest, sample.needle, sample.cell.position)
        return PromptBuilder(manifest, media_views, self.chat_template)


class _NeedleViews(MediaViews):
    """Views of a video whose frame ``position`` is replaced by the image ``needle``."""

    def __init__(self, index: Index, manifest: Manifest, needle: Path, position: int) -> None:
        super().__init__(index, manifest)
        self._needle, self._position = needle, position

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        super().read_frames(view, start, out)
        if start <= self._position < start + len(out):
            size, stored = out.shape[1], self.frames
            image = resize(np.asarray(read_image(self._needle)), size, size)
            out[self._position - start] = decode_jpeg(encode_jpeg(image, stored.quality, stored.subsampling))


def _with_frames(manifest: Manifest, count: int) -> Manifest:
    """Return ``manifest`` with ``count`` frames per video, sampled by ``middle``."""
    frames = dataclasses.replace(manifest.frames, sampler="middle", min=count, max=count)
    return dataclasses.replace(manifest, frames=frames, compat="none")


def _open_video(video: str | Path, manifest: Manifest, count: int) -> Index:
    """Decode the frames of ``video`` that any question uses; at least ``count`` frames are needed."""
    index = build_memory_index([MediaFile(video)], manifest)
    if index.media["kind"][0].as_py() != "video":
        raise MediaError("no_video_stream", video, "is an image; needles are inserted into videos")
    if (vlen := index.media["vlen"][0].as_py()) < count:
        raise MediaError(
            "too_few_frames", video, f"has {vlen:,} frames; name a longer video, or at most as many frames"
        )
    return index
