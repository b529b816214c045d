"""The shard roots of a manifest as one: dialogues numbered through, each root with its index, views and tokens.

A dialogue's number is its row in its root's index plus the dialogues of the roots before. What is held for each is four
lengths of 4 bytes; all else is read from memory-mapped files, whose pages are given back now and then, so that memory
does not grow with what was read.
"""

from __future__ import annotations

import difflib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.config.data import MixRootConfig
from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.shards.index import Index
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.storage import ReadOptions
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.pipeline.tokenization.token_cache import TokenCache
from framestream.pipeline.utils.arrow_mmap import ResidentPageLimiter

LENGTHS = ("length", "clips", "tiles", "num_label_tokens")  #: of :class:`Tokens`


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """One root."""

    index: Index
    media_views: MediaViews
    tokens: TokenCache

    def in_split(self, split: str) -> np.ndarray:
        """Whether each dialogue is of ``split``, bool (dialogues,)."""
        chunks = self.index.maps["dialogues"].chunks("split")
        found = [pc.equal(chunk, split).to_numpy(zero_copy_only=False) for chunk in chunks]
        return np.concatenate([np.empty(0, dtype=bool), *found])

    def entry_names(self) -> list[str]:
        """The entries that have dialogues, in the order of the index."""
        chunks = self.index.maps["dialogues"].chunks("entry")
        return list(dict.fromkeys(name for chunk in chunks for name in pc.unique(chunk).to_pylist()))

    def entry_codes(self, names: Sequence[str]) -> np.ndarray:
        """The place in ``names`` of each dialogue's entry, int32 (dialogues,); -1 for others."""
        chunks, values = self.index.maps["dialogues"].chunks("entry"), pa.array(names, pa.string())
        codes = [pc.fill_null(pc.index_in(chunk, value_set=values), -1).to_numpy() for chunk in chunks]
        return np.concatenate([np.empty(0, dtype=np.int32), *codes])


class MediaReader:
    """Pixels of the media of all roots, by view: what decoding needs of a corpus. Usable from many threads."""

    def __init__(self, visuals: Sequence[MediaViews]) -> None:
        self._visuals = list(visuals)
        self._pages = ResidentPageLimiter(self._release)

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        """See :meth:`Visuals.read_frames`."""
        self._pages.on_lookup()
        self._visuals[view.root].read_frames(view, start, out)

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        """See :meth:`Visuals.read_still`."""
        self._pages.on_lookup()
        self._visuals[view.root].read_image(view, out)

    def describe(self, view: MediaView) -> str:
        """Shard and member of a medium, for messages."""
        return self._visuals[view.root].describe(view)

    def _release(self) -> None:
        for visuals in self._visuals:
            visuals.index.release()


class ConcatDataset:
    """Dialogues of all roots by number; usable from many threads.

    ``length``, ``clips``, ``tiles`` and ``learned`` are int32 arrays (dialogues,), as of :class:`Tokens`.
    """

    length: np.ndarray
    clips: np.ndarray
    tiles: np.ndarray
    num_label_tokens: np.ndarray

    def __init__(self, parts: Sequence[DatasetPart]) -> None:
        self.parts = list(parts)
        sizes = [len(part.tokens.length) for part in parts]
        self.starts = np.cumsum([0, *sizes]).tolist()
        for name in LENGTHS:
            arrays = [getattr(part.tokens, name) for part in parts]
            setattr(self, name, arrays[0] if len(parts) == 1 else np.concatenate(arrays))
            for part, start, size in zip(parts, self.starts, sizes, strict=False):  # the roots' own become views
                setattr(part.tokens, name, getattr(self, name)[start : start + size])
        self._columns = [[part.index.dialogues[name] for name in ("key", "media", "entry")] for part in parts]
        self._other: tuple[list[TokenCache], ConcatDataset] | None = None
        self._pages = ResidentPageLimiter(self.release)
        self.media_reader = MediaReader([part.media_views for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def for_epoch(self, epoch: int) -> ConcatDataset:
        """The corpus as it is in one epoch; texts and lengths differ with ``compat: published`` only.

        Raises:
            ManifestError: an epoch after the last of ``train.epochs``, with ``compat: published``.
        """
        tokens = [part.tokens.for_epoch(epoch) for part in self.parts]
        if all(there is part.tokens for there, part in zip(tokens, self.parts, strict=True)):
            return self
        if self._other is None or any(a is not b for a, b in zip(tokens, self._other[0], strict=True)):
            parts = [replace(part, tokens=there) for part, there in zip(self.parts, tokens, strict=True)]
            self._other = tokens, ConcatDataset(parts)
        return self._other[1]

    def locate(self, number: int) -> tuple[int, int]:
        """Number of the root, and the row in its index, of a dialogue."""
        root = bisect_right(self.starts, number) - 1
        return root, number - self.starts[root]

    def key(self, number: int) -> str:
        """The key of a dialogue."""
        root, row = self.locate(number)
        return self._columns[root][0][row].as_py()

    def views(self, number: int) -> list[MediaView]:
        """What is shown of the media of a dialogue; see :meth:`Visuals.views`."""
        self._pages.on_lookup()
        root, row = self.locate(number)
        _, media, entry = self._columns[root]
        visuals = self.parts[root].media_views
        return visuals.views(media[row].as_py(), entry[row].as_py() if visuals.bounds else "")

    def text(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a dialogue, see :meth:`Tokens.of`; copies, so that no page is looked at later."""
        self._pages.on_lookup()
        root, row = self.locate(number)
        ids, labels = self.parts[root].tokens.get(row)
        return ids.copy(), labels.copy()

    def skip_reason(self, number: int) -> str:
        """Why a dialogue cannot be used, or what it loses, see :meth:`Tokens.why`."""
        root, row = self.locate(number)
        return self.parts[root].tokens.skip_reason(row)

    def release(self) -> None:
        """Give back the memory of what was read of indexes and token caches; see :mod:`framestream.pipeline.utils.arrow_mmap`."""
        for part in self.parts:
            part.index.release()
            part.tokens.release()


def mix_roots(manifest: Manifest) -> tuple[MixRootConfig, ...]:
    """What is read: ``mix``, or the stage's own shards once."""
    return manifest.mix or (MixRootConfig(root=str(manifest.shard_address)),)


def open_dataset(manifest: Manifest) -> ConcatDataset:
    """All roots of ``manifest``, checked against it; each is tokenised once where needed.

    Raises:
        ShardsError: shards are not there, or cannot give the frames that are wanted.
        ManifestError: the tokenizer cannot be loaded, or ``mix`` names an entry that a root does not have.
    """
    roots, opened = mix_roots(manifest), []
    for number, root in enumerate(roots):
        index, visuals = _open(manifest, number, root)
        index.validate_manifest(manifest)
        for place, entry in enumerate(root.entries):
            index.check_frames(entry.frames(manifest.frames), f"mix[{number}].entries[{place}]")
        opened.append((index, visuals))
    conversation = build_chat_template(manifest)
    parts = [
        DatasetPart(index, visuals, TokenCache(index, manifest, conversation, visuals)) for index, visuals in opened
    ]
    for number, (root, part) in enumerate(zip(roots, parts, strict=True)):
        _check_entries(number, root, part)
    return ConcatDataset(parts)


def open_media_reader(manifest: Manifest) -> MediaReader:
    """The pixels alone, of roots that :func:`open_corpus` has checked; ShardsError if they cannot be opened."""
    return MediaReader([_open(manifest, number, root)[1] for number, root in enumerate(mix_roots(manifest))])


def _open(manifest: Manifest, number: int, root: MixRootConfig) -> tuple[Index, MediaViews]:
    index = Index.open(root.root, ReadOptions.from_manifest(manifest.loader))
    return index, MediaViews(index, manifest, root.entries, number)


def _check_entries(number: int, root: MixRootConfig, part: DatasetPart) -> None:
    there = part.entry_names() if root.entries else []
    for place, entry in enumerate(root.entries):
        if entry.entry not in there:
            near = difflib.get_close_matches(entry.entry, there, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(there[:8])}"
            raise ManifestError(f"mix[{number}].entries[{place}].entry: {root.root} has no {entry.entry}; {hint}")
