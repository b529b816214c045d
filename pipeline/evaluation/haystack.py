"""Needle in a haystack: questions about images that replace frames of a long video.

As in V-NIAH (Long Context Transfer from Language to Vision, arXiv 2406.16852): a video is sampled at a number of
frames, the frame at a given depth is replaced by an image, and the model is asked about the image. Or a chain of images
replaces several frames (:mod:`framestream.pipeline.evaluation.needle_chains`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.file_questions import FileQuestions
from framestream.pipeline.evaluation.needle_chains import (
    GIVEN,
    Needle,
    NeedleChain,
    build_chains,
    chain_positions,
    given_chain,
    image_contents,
    write_text,
)
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.evaluation.questions import MediaContents, Question, QuestionList
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.image import read_image
from framestream.pipeline.media.jpeg import decode_jpeg, encode_jpeg
from framestream.pipeline.media.resize import resize
from framestream.pipeline.shards.index import Index, ShardsError
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, build_memory_index


class HaystackCell(NamedTuple):
    """One cell of a heat map, or all chains at one number of frames."""

    frames: int  #: frames of the video
    depth: float | None  #: position of the needle, in percent of the way from the first to the last frame; None: chains

    @property
    def name(self) -> str:
        """The family of its questions."""
        return f"{self.frames} frames, chains" if self.depth is None else f"{self.frames} frames, {self.depth:g} % deep"

    def positions(self, needles: int) -> list[int]:
        """Return the numbers of the frames that the needles replace, from 0."""
        if self.depth is None:
            return chain_positions(needles, self.frames)
        return [round(self.depth / 100 * (self.frames - 1))]


class HaystackSample(NamedTuple):
    """The media of a question: a video that contains needles."""

    cell: HaystackCell
    video: int  #: number of the video
    needles: tuple[Needle, ...]  #: in the order of the video


class NeedleOrigin(NamedTuple):
    """Where a question comes from."""

    kind: str  #: family of the annotation
    chain: str  #: name of the chain


class Haystack(QuestionList):
    """The questions of an annotation file about images, repeated for every number of frames and every depth.

    The images are inserted into ``videos`` in turn. Frames are sampled by ``middle``. They are resized, encoded and
    described as the manifest says. Numbers of frames for which the model has too few positions are ``rejected``.

    Args:
        needles: an annotation file whose questions are about one image each, below ``root``.
        videos: files to insert them into; each must have as many frames as the largest of ``frames``.
        frames: numbers of frames, multiples of the manifest's ``frames.clip_frames``.
        depths: percentages.
        hops: None for single needles. For chains, the images of one, or :data:`.needle_chains.GIVEN` if each question
            is about the images of its chain. Chains have no depth.

    Attributes:
        cells: by the family of their questions.
        origins: of each question, by its key.

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
        hops: int | None = None,
    ) -> None:
        source = FileQuestions(manifest, needles, root)
        super().__init__(source.chat_template)
        self.rejected = source.rejected
        questions: list[Question] = []
        wanted = "a chain of two images or more" if hops == GIVEN else "one image"
        for question in source:
            readers = [file.reader for file in question.media]
            if readers == [IMAGE_READER] * (max(len(readers), 2) if hops == GIVEN else 1):
                questions.append(question)
            else:
                self.rejected.append(f"{needles}: {question.key}: needles are questions about {wanted}")
        if not questions:
            raise ShardsError(
                f"{needles}: no question about {wanted} found; give an image and a question per needle"
                if hops != GIVEN
                else f"{needles}: no question about {wanted} found; give the images of a chain, or a number of --hops"
            )
        contents = image_contents(questions)
        chains, rejected = _make_chains(questions, hops, manifest.seed, contents)
        self.rejected += [f"{needles}: {line}" for line in rejected]
        if not chains:
            raise ShardsError(f"{needles}: {rejected[0]}")
        self._base = manifest
        frames = self._leave_out_too_long(chains, videos, frames)
        self._manifests = {count: _with_frames(manifest, count) for count in frames}
        self._videos = self._open_videos(videos, max(frames))
        places: Sequence[float | None] = [None] if hops is not None else depths
        self.cells = {cell.name: cell for cell in (HaystackCell(count, depth) for count in frames for depth in places)}
        self.origins: dict[str, NeedleOrigin] = {}
        self._contents: list[MediaContents] = []
        for name, cell in self.cells.items():
            for number, chain in enumerate(chains):
                key, video = f"{chain.question.key}, {name}", number % len(self._videos)
                media = [HaystackSample(cell, video, chain.needles)]
                meta = {**chain.question.meta, "family": name}
                self._questions.append(dataclasses.replace(chain.question, key=key, meta=meta, media=media))
                self.origins[key] = NeedleOrigin(chain.question.family, chain.name)
                asked, shown = (
                    frozenset(contents[Path(item.path)] for item in items)
                    for items in (chain.question.media, chain.needles)
                )
                self._contents.append(MediaContents(1, asked, shown))

    def prompt_length(self, i: int, media_of: int | None = None) -> int:
        """Count the tokens of the prompt, with visual tokens; no media are decoded."""
        prompts, media = self._prompts_of(i, media_of)
        return prompts.num_tokens(self._questions[i].turns, media)

    def cost_group(self, i: int) -> str:
        """Return the number of frames."""
        return str(self.cells[self._questions[i].family].frames)

    def contents(self, i: int) -> MediaContents:
        """Return the digests of the images that question ``i`` is about, and of all images in its video.

        The question of a given chain is about any of its images: which of them has the answer is not known.
        """
        return self._contents[i]

    def _prompts_of(self, i: int, media_of: int | None = None) -> tuple[PromptBuilder, Sequence[int]]:
        (sample,) = self._media(i, media_of)
        manifest = self._manifests[sample.cell.frames]
        positions = sample.cell.positions(len(sample.needles))
        needles = dict(zip(positions, sample.needles, strict=True))
        media_views = _NeedleViews(self._videos[sample.video], manifest, needles)
        return PromptBuilder(manifest, media_views, self.chat_template), [0]

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

    def _leave_out_too_long(
        self, chains: Sequence[NeedleChain], videos: Sequence[str | Path], frames: Sequence[int]
    ) -> list[int]:
        """Return the numbers of frames for which the shortest question fits; the others are ``rejected``.

        A few frames of a video are decoded: how many tokens a prompt has depends on its length in seconds.

        Raises:
            ShardsError: none fits.
        """
        limit, clip = self._base.model.language_model.max_position_embeddings, self._base.frames.clip_frames
        index = next(filter(None, (self._probe(video) for video in videos)), None)
        if index is None:
            return list(frames)  # opening the videos says why

        def tokens(count: int, turns: Sequence[dict]) -> int:
            manifest = _with_frames(self._base, count)
            return PromptBuilder(manifest, MediaViews(index, manifest), self.chat_template).num_tokens(turns, [0])

        shortest = min((chain.question.turns for chain in chains), key=lambda turns: tokens(clip, turns))
        counts = {count: tokens(count, shortest) for count in frames}
        if all(count < limit for count in counts.values()):
            return list(frames)
        low, high = 0, limit // clip  # clips that fit, and that do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if tokens(middle * clip, shortest) < limit else (low, middle)
        lines = [
            f"a prompt of {number:,} frames has {count:,} tokens, and the limit of the model is {limit:,} "
            f"(model.language_model.max_position_embeddings); at most {low * clip:,} frames fit"
            for number, count in counts.items()
            if count >= limit
        ]
        if len(lines) == len(counts):
            raise ShardsError(lines[0])
        self.rejected += lines
        return [count for count in frames if counts[count] < limit]

    def _probe(self, video: str | Path) -> Index | None:
        """Decode one clip of a video; None if it cannot be used."""
        clip = self._base.frames.clip_frames
        try:
            return _open_video(video, _with_frames(self._base, clip), clip)
        except (MediaError, OSError, ValueError):
            return None


class _NeedleViews(MediaViews):
    """Views of a video some of whose frames are replaced by needles, by position among the frames shown."""

    def __init__(self, index: Index, manifest: Manifest, needles: Mapping[int, Needle]) -> None:
        super().__init__(index, manifest)
        shown = self.views([0])[0].frame_indices  # distinct, because the video has as many frames
        self._needles = {int(shown[position]): needle for position, needle in needles.items()}

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        super().read_frames(view, start, out)
        size, stored = out.shape[1], self.frames
        for k, index in enumerate(view.frame_indices[start : start + len(out)].tolist()):
            if needle := self._needles.get(index):
                image = resize(np.asarray(read_image(needle.path)), size, size)
                if needle.text:
                    image = write_text(image, needle.text)
                out[k] = decode_jpeg(encode_jpeg(image, stored.quality, stored.subsampling))


def _make_chains(
    questions: Sequence[Question], hops: int | None, seed: int, contents: Mapping[Path, str]
) -> tuple[list[NeedleChain], list[str]]:
    """Return the needles of each question, and a line for each question that has none."""
    if hops is None:
        paths = [Path(question.media[0].path) for question in questions]
        return [NeedleChain(one, (Needle(path),), one.key) for one, path in zip(questions, paths, strict=True)], []
    if hops == GIVEN:
        return [given_chain(question) for question in questions], []
    return build_chains(questions, hops, seed, contents)


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
