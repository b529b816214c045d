"""A needle in a haystack: questions about a picture that stands in place of one frame of a long video.

As in V-NIAH (Long Context Transfer from Language to Vision, arXiv 2406.16852): a video is sampled at so many frames,
one of them, so deep into the video, is replaced by a picture, and the model is asked about the picture.
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
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.image import read_image
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg
from framestream.pipeline.media.resize import resize
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, build_memory_index


class HaystackCell(NamedTuple):
    """One place of a heat map."""

    frames: int  #: that are shown
    depth: float  #: of the needle, percent of the way from the first to the last of them

    @property
    def name(self) -> str:
        """The family of its questions."""
        return f"{self.frames} frames, {self.depth:g} % deep"

    @property
    def position(self) -> int:
        """Which of the frames the needle replaces, from 0."""
        return round(self.depth / 100 * (self.frames - 1))


class HaystackSample(NamedTuple):
    """What a question shows: a video with a picture in it."""

    cell: HaystackCell
    video: int
    needle: Path


class Haystack(FileQuestions):
    """The questions of an annotation file of pictures, each asked once for every number of frames and every depth.

    The pictures are hidden in ``videos`` in turn. Frames are those that the sampler ``middle`` takes, resized, encoded
    and worded as the manifest says.

    Args:
        needles: an annotation file whose questions show one picture each, below ``root``.
        videos: files to hide them in; each needs as many frames as are asked for.
        frames: numbers of frames, multiples of the manifest's ``frames.clip_frames``.
        depths: percent.

    Attributes:
        cells: by the family of their questions.

    Raises:
        AnnotationFileError, ShardsError: the needles cannot be read, or none of them can be asked.
        MediaError: a video cannot be used, or is too short; one line that names it.
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
        super().__init__(manifest, needles, root)
        asked = []
        for question in self._list:
            if [medium.reader for medium in question.media] == [IMAGE_READER]:
                asked.append(question)
            else:
                self.rejected.append(f"{needles}: {question.key}: needles are questions about one picture")
        if not asked:
            raise ShardsError(f"{needles}: no question about one picture; needles are pictures with a question each")
        self._manifests = {count: _sampled(manifest, count) for count in frames}
        self._videos = [_stored(video, self._manifests[max(frames)], max(frames)) for video in videos]
        self.cells = {cell.name: cell for cell in (HaystackCell(count, depth) for count in frames for depth in depths)}
        self._list = [
            dataclasses.replace(
                question,
                key=f"{question.key}, {name}",
                meta={**question.meta, "family": name},
                media=[HaystackSample(cell, number % len(videos), question.media[0].path)],
            )
            for name, cell in self.cells.items()
            for number, question in enumerate(asked)
        ]

    def prompt_length(self, i: int, media_of: int | None = None) -> int:
        """Tokens of the prompt, visual ones included; nothing is decoded."""
        (shown,) = self._media(i, media_of)
        return self._prompts(shown).tokens(self._list[i].turns, [0])

    def prompt(self, i: int, media_of: int | None = None, shuffle: np.random.Generator | None = None) -> Batch:
        """As of :meth:`framestream.pipeline.evaluation.questions.Questions.prompt`.

        Raises:
            MediaError: the picture cannot be used.
        """
        (shown,) = self._media(i, media_of)
        return self._prompts(shown).build(self._list[i].turns, [0], self._list[i].key, shuffle)

    def _prompts(self, shown: HaystackSample) -> PromptBuilder:
        manifest = self._manifests[shown.cell.frames]
        visuals = _Hidden(self._videos[shown.video], manifest, shown.needle, shown.cell.position)
        return PromptBuilder(manifest, visuals, self.chat_template)


class _Hidden(MediaViews):
    """A video with the picture ``needle`` in place of the frame ``place`` that is shown."""

    def __init__(self, index: Index, manifest: Manifest, needle: Path, place: int) -> None:
        super().__init__(index, manifest)
        self._needle, self._place = needle, place

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        super().read_frames(view, start, out)
        if start <= self._place < start + len(out):
            size, stored = out.shape[1], self.frames
            picture = resize(np.asarray(read_image(self._needle)), size, size)
            out[self._place - start] = decode_jpeg(encode_jpeg(picture, stored.quality, stored.subsampling))


def _sampled(manifest: Manifest, count: int) -> Manifest:
    """``manifest`` with ``count`` frames of every video."""
    frames = dataclasses.replace(manifest.frames, sampler="middle", min=count, max=count)
    return dataclasses.replace(manifest, frames=frames, compat="none")


def _stored(video: str | Path, manifest: Manifest, count: int) -> Index:
    """The frames of ``video`` that are ever shown."""
    index = build_memory_index([MediaFile(video)], manifest)
    if index.media["kind"][0].as_py() != "video":
        raise MediaError("no_video_stream", video, "is a picture; needles are hidden in videos")
    if (vlen := index.media["vlen"][0].as_py()) < count:
        raise MediaError(
            "too_few_frames", video, f"has {vlen:,} frames; name a longer video, or at most as many frames"
        )
    return index
