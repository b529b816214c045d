"""The shard roots of a manifest as one dataset, each root with its index, media views and tokens.

The number of a dialogue is its row in the index of its root plus the number of dialogues of the roots before. Only four
lengths of 4 bytes per dialogue are stored in memory. Everything else is read from memory-mapped files. Their pages are
released from time to time, so that memory does not grow with what was read.
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

LENGTH_NAMES = ("length", "clips", "tiles", "num_label_tokens")  #: attributes of :class:`TokenCache`


@dataclass(frozen=True, slots=True)
class DatasetPart:
    """One shard root."""

    index: Index
    media_views: MediaViews
    tokens: TokenCache

    def in_split(self, split: str) -> np.ndarray:
        """Return whether each dialogue is of ``split``, bool (dialogues,)."""
        chunks = self.index.maps["dialogues"].chunks("split")
        found = [pc.equal(chunk, split).to_numpy(zero_copy_only=False) for chunk in chunks]
        return np.concatenate([np.empty(0, dtype=bool), *found])

    def entry_names(self) -> list[str]:
        """Return the names of the entries that have dialogues, in the order of the index."""
        chunks = self.index.maps["dialogues"].chunks("entry")
        return list(dict.fromkeys(name for chunk in chunks for name in pc.unique(chunk).to_pylist()))

    def entry_codes(self, names: Sequence[str]) -> np.ndarray:
        """Return the position in ``names`` of the entry of each dialogue, int32 (dialogues,); -1 for other entries."""
        chunks, values = self.index.maps["dialogues"].chunks("entry"), pa.array(names, pa.string())
        codes = [pc.fill_null(pc.index_in(chunk, value_set=values), -1).to_numpy() for chunk in chunks]
        return np.concatenate([np.empty(0, dtype=np.int32), *codes])


class MediaReader:
    """Reads the pixels of media views of all roots. It can be used from many threads."""

    def __init__(self, media_views: Sequence[MediaViews]) -> None:
        self._media_views = list(media_views)
        self._pages = ResidentPageLimiter(self._release)

    def read_frames(self, view: MediaView, start: int, out: np.ndarray) -> None:
        """See :meth:`MediaViews.read_frames`."""
        self._pages.on_lookup()
        self._media_views[view.root].read_frames(view, start, out)

    def read_image(self, view: MediaView, out: np.ndarray) -> None:
        """See :meth:`MediaViews.read_image`."""
        self._pages.on_lookup()
        self._media_views[view.root].read_image(view, out)

    def prefetch(self, view: MediaView, start: int, count: int) -> bool:
        """See :meth:`MediaViews.prefetch`."""
        self._pages.on_lookup()
        return self._media_views[view.root].prefetch(view, start, count)

    def describe(self, view: MediaView) -> str:
        """Name the shard and the member of a media item, for messages."""
        return self._media_views[view.root].describe(view)

    def _release(self) -> None:
        for media_views in self._media_views:
            media_views.index.drop_pages()


class ConcatDataset:
    """Dialogues of all roots by number. It can be used from many threads.

    ``length``, ``clips``, ``tiles`` and ``num_label_tokens`` are int32 arrays (dialogues,), as of :class:`TokenCache`.
    """

    length: np.ndarray
    clips: np.ndarray
    tiles: np.ndarray
    num_label_tokens: np.ndarray

    def __init__(self, parts: Sequence[DatasetPart]) -> None:
        self.parts = list(parts)
        sizes = [len(part.tokens.length) for part in parts]
        self.starts = np.cumsum([0, *sizes]).tolist()
        for name in LENGTH_NAMES:
            arrays = [getattr(part.tokens, name) for part in parts]
            joined = arrays[0] if len(parts) == 1 else np.concatenate(arrays)
            setattr(self, name, joined)
            # the arrays of the roots become views of the joined one, so that memory holds each length once
            for part, start, size in zip(parts, self.starts, sizes, strict=False):
                setattr(part.tokens, name, joined[start : start + size])
        self._columns = [[part.index.dialogues[name] for name in ("key", "media", "entry")] for part in parts]
        self._other_epoch: tuple[list[TokenCache], ConcatDataset] | None = None
        self._pages = ResidentPageLimiter(self.release)
        self.media_reader = MediaReader([part.media_views for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def for_epoch(self, epoch: int) -> ConcatDataset:
        """Return the dataset of one epoch; only with ``compat: published`` do texts and lengths differ between epochs.

        Raises:
            ManifestError: an epoch after the last of ``train.epochs``, with ``compat: published``.
        """
        tokens = [part.tokens.for_epoch(epoch) for part in self.parts]
        if all(new is part.tokens for new, part in zip(tokens, self.parts, strict=True)):
            return self
        if self._other_epoch is None or any(a is not b for a, b in zip(tokens, self._other_epoch[0], strict=True)):
            parts = [replace(part, tokens=new) for part, new in zip(self.parts, tokens, strict=True)]
            self._other_epoch = tokens, ConcatDataset(parts)
        return self._other_epoch[1]

    def locate(self, number: int) -> tuple[int, int]:
        """Return the number of the root of a dialogue, and the row in its index."""
        root = bisect_right(self.starts, number) - 1
        return root, number - self.starts[root]

    def key(self, number: int) -> str:
        """Return the key of a dialogue."""
        root, row = self.locate(number)
        return self._columns[root][0][row].as_py()

    def views(self, number: int) -> list[MediaView]:
        """Return the media views of a dialogue; see :meth:`MediaViews.views`."""
        self._pages.on_lookup()
        root, row = self.locate(number)
        _, media, entry = self._columns[root]
        media_views = self.parts[root].media_views
        return media_views.views(media[row].as_py(), entry[row].as_py() if media_views.frame_bounds else "")

    def ids_and_labels(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return copies of the ids and labels of a dialogue, see :meth:`TokenCache.get`; no page is read later."""
        self._pages.on_lookup()
        root, row = self.locate(number)
        ids, labels = self.parts[root].tokens.get(row)
        return ids.copy(), labels.copy()

    def skip_reason(self, number: int) -> str:
        """Explain why a dialogue cannot be used or is truncated, see :meth:`TokenCache.skip_reason`."""
        root, row = self.locate(number)
        return self.parts[root].tokens.skip_reason(row)

    def release(self) -> None:
        """Release the memory of indexes and token caches, see :mod:`framestream.pipeline.utils.arrow_mmap`."""
        for part in self.parts:
            part.index.drop_pages()
            part.tokens.release()


def mix_roots(manifest: Manifest) -> tuple[MixRootConfig, ...]:
    """Return the shard roots to read: ``mix``, or the shards of the stage."""
    return manifest.mix or (MixRootConfig(root=str(manifest.shard_address)),)


def open_dataset(manifest: Manifest) -> ConcatDataset:
    """Open all roots of ``manifest``, check them against it, and tokenize them if they are not tokenized yet.

    Raises:
        ShardsError: shards are missing, or do not contain the frames of the manifest.
        ManifestError: the tokenizer cannot be loaded, or ``mix`` names an entry that a root does not have.
    """
    roots, opened = mix_roots(manifest), []
    for number, root in enumerate(roots):
        index, media_views = _open(manifest, number, root)
        index.validate_manifest(manifest)
        for position, entry in enumerate(root.entries):
            index.validate_frames(entry.bound_frames(manifest.frames), f"mix[{number}].entries[{position}]")
        opened.append((index, media_views))
    chat_template = build_chat_template(manifest)
    parts = [
        DatasetPart(index, media_views, TokenCache(index, manifest, chat_template, media_views))
        for index, media_views in opened
    ]
    for number, (root, part) in enumerate(zip(roots, parts, strict=True)):
        _check_entries(number, root, part)
    return ConcatDataset(parts)


def open_media_reader(manifest: Manifest) -> MediaReader:
    """Open only the pixels of roots that :func:`open_dataset` has checked; ShardsError if they cannot be opened."""
    return MediaReader([_open(manifest, number, root, True)[1] for number, root in enumerate(mix_roots(manifest))])


def _open(manifest: Manifest, number: int, root: MixRootConfig, checked: bool = False) -> tuple[Index, MediaViews]:
    index = Index.open(root.root, ReadOptions.from_manifest(manifest.loader), checked)
    return index, MediaViews(index, manifest, root.entries, number)


def _check_entries(number: int, root: MixRootConfig, part: DatasetPart) -> None:
    names = part.entry_names() if root.entries else []
    for position, entry in enumerate(root.entries):
        if entry.entry not in names:
            near = difflib.get_close_matches(entry.entry, names, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(names[:8])}"
            raise ManifestError(f"mix[{number}].entries[{position}].entry: {root.root} has no {entry.entry}; {hint}")
