"""Questions of an annotation file about files as they are: nothing is built."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from framestream.pipeline.annotations.normalize import Annotation, AnnotationError, MediaRef
from framestream.pipeline.annotations.reader import read_annotations
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.evaluation.questions import Question, Questions
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.shards.memory_index import IMAGE_READER, MediaFile, MediaFileCache
from framestream.pipeline.tokenization.chat_template import build_chat_template


class FileQuestions(Questions):
    """The answered dialogues of the annotation file ``path``, whose media lie below ``root``.

    Media are decoded when they are asked about, as a build with the manifest would have.

    Attributes:
        refused: samples that cannot be used, one line each.

    Raises:
        AnnotationFileError: the file cannot be read.
        ShardsError: it holds no answered dialogue.
    """

    def __init__(self, manifest: Manifest, path: str | Path, root: str | Path, reader: str = "decord") -> None:
        self.chat_template = build_chat_template(manifest)
        self._manifest, self._root, self._handfuls = manifest, Path(root).resolve(), MediaFileCache(manifest)
        self._list, self.rejected = [], []
        entry = EntryConfig(annotation=str(path), root=str(root), reader=reader)
        for found in read_annotations(path, entry, seed=manifest.seed, compat=manifest.compat):
            try:
                self._list.append(self._question(found))
            except (AnnotationError, MediaError, ValueError) as error:
                self.rejected.append(f"{path}: sample {found.position}: {error}")
        if not self._list:
            why = f"; the first is refused: {self.rejected[0]}" if self.rejected else ""
            raise ShardsError(f"{path}: no answered dialogue{why}")

    def _question(self, found: Annotation | AnnotationError) -> Question:
        if isinstance(found, AnnotationError):
            raise found
        media = [self._file(ref) for ref in found.media]
        key = f"{found.entry}:{found.position}:{found.id}"
        return Question.of(key, list(found.turns), found.entry, found.meta, media)

    def _file(self, ref: MediaRef) -> MediaFile:
        path = (self._root / ref.path).resolve()
        if not path.is_relative_to(self._root):
            raise MediaError("outside_root", ref.path, f"leads out of {self._root}")
        return MediaFile(path, ref.start, ref.end, IMAGE_READER if ref.kind == "image" else ref.reader)

    def prompt_length(self, i: int, media_of: int | None = None) -> int:
        """0: it is not known before the media are decoded."""
        return 0

    def prompt(self, i: int, media_of: int | None = None, shuffle: np.random.Generator | None = None) -> Batch:
        """As of :meth:`Questions.prompt`.

        Raises:
            MediaError: a file cannot be used.
            ValueError: the other question has fewer media than this one shows.
        """
        files: Sequence[MediaFile] = self._media(i, media_of)
        prompts = PromptBuilder(self._manifest, self._handfuls.media_views(files), self.chat_template)
        return prompts.build(self._list[i].turns, range(len(files)), self._list[i].key, shuffle)
