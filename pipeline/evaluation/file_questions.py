"""Questions of an annotation file about raw media files, without a build."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, MediaRef
from framestream.pipeline.annotations.reader import read_annotations
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.evaluation.questions import Question, QuestionList, count_rejected
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, MediaFileCache
from framestream.pipeline.tokenization.chat_template import build_chat_template


class FileQuestions(QuestionList):
    """The questions of the annotation file ``path``, whose media are below ``root``.

    Media are decoded when a prompt needs them, as a build with the manifest would decode them.

    Attributes:
        rejected: samples that cannot be used, one line each.

    Raises:
        AnnotationFileError: the file cannot be read.
        ShardsError: it contains no question.
    """

    def __init__(self, manifest: Manifest, path: str | Path, root: str | Path, reader: str = "decord") -> None:
        super().__init__(build_chat_template(manifest))
        self._manifest, self._root, self._files = manifest, Path(root).resolve(), MediaFileCache(manifest)
        entry = EntryConfig(annotation=str(path), root=str(root), reader=reader)
        for found in read_annotations(path, entry, seed=manifest.seed, compat=manifest.compat):
            try:
                self._questions.append(self._question(found))
            except (AnnotationError, MediaError, ValueError) as error:
                self.rejected.append(f"{path}: sample {found.position}: {error}")
        if not self._questions:
            why = f"; {count_rejected(self.rejected)}" if self.rejected else ""
            raise ShardsError(f"{path}: no samples with an answer found{why}")

    def prompt_length(self, i: int, media_of: int | None = None) -> None:
        """Return None: the length is unknown before the media are decoded."""
        return None

    def _prompts_of(self, i: int, media_of: int | None = None) -> tuple[PromptBuilder, Sequence[int]]:
        files: Sequence[MediaFile] = self._media(i, media_of)
        return PromptBuilder(self._manifest, self._files.media_views(files), self.chat_template), range(len(files))

    def _question(self, found: Annotation | AnnotationError) -> Question:
        if isinstance(found, AnnotationError):
            raise found
        media = [self._file(ref) for ref in found.media]
        key = f"{found.entry}:{found.position}:{found.id}"
        return Question.from_turns(key, list(found.turns), found.entry, found.meta, media)

    def _file(self, ref: MediaRef) -> MediaFile:
        path = (self._root / ref.path).resolve()
        if not path.is_relative_to(self._root):
            raise MediaError("outside_root", ref.path, f"leads out of {self._root}")
        return MediaFile(path, ref.start, ref.end, IMAGE_READER if ref.kind == "image" else ref.reader)
