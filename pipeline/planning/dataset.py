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

from pipeline.config.data import MixRoot
from pipeline.config.manifest import Manifest, ManifestError
from pipeline.shards.index import Index
from pipeline.shards.media_view import View, Visuals
from pipeline.storage import Reading
from pipeline.tokenization.chat_template import conversation_of
from pipeline.tokenization.token_cache import Tokens
from pipeline.utils.arrow_mmap import PageLimit

LENGTHS = ("length", "clips", "tiles", "learned")  #: of :class:`Tokens`


@dataclass(frozen=True, slots=True)
class Part:
    """One root."""

    index: Index
    visuals: Visuals
    tokens: Tokens

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


class Pictures:
    """Pixels of the media of all roots, by view: what decoding needs of a corpus. Usable from many threads."""

    def __init__(self, visuals: Sequence[Visuals]) -> None:
        self._visuals = list(visuals)
        self._pages = PageLimit(self._release)

    def read_frames(self, view: View, start: int, out: np.ndarray) -> None:
        """See :meth:`Visuals.read_frames`."""
        self._pages.looked_up()
        self._visuals[view.root].read_frames(view, start, out)

    def read_still(self, view: View, out: np.ndarray) -> None:
        """See :meth:`Visuals.read_still`."""
        self._pages.looked_up()
        self._visuals[view.root].read_still(view, out)

    def where(self, view: View) -> str:
        """Shard and member of a medium, for messages."""
        return self._visuals[view.root].where(view)

    def _release(self) -> None:
        for visuals in self._visuals:
            visuals.index.release()


class Corpus:
    """Dialogues of all roots by number; usable from many threads.

    ``length``, ``clips``, ``tiles`` and ``learned`` are int32 arrays (dialogues,), as of :class:`Tokens`.
    """

    length: np.ndarray
    clips: np.ndarray
    tiles: np.ndarray
    learned: np.ndarray

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        sizes = [len(part.tokens.length) for part in parts]
        self.starts = np.cumsum([0, *sizes]).tolist()
        for name in LENGTHS:
            arrays = [getattr(part.tokens, name) for part in parts]
            setattr(self, name, arrays[0] if len(parts) == 1 else np.concatenate(arrays))
            for part, start, size in zip(parts, self.starts, sizes, strict=False):  # the roots' own become views
                setattr(part.tokens, name, getattr(self, name)[start : start + size])
        self._columns = [[part.index.dialogues[name] for name in ("key", "media", "entry")] for part in parts]
        self._other: tuple[list[Tokens], Corpus] | None = None
        self._pages = PageLimit(self.release)
        self.pictures = Pictures([part.visuals for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def at(self, epoch: int) -> Corpus:
        """The corpus as it is in one epoch; texts and lengths differ with ``compat: published`` only.

        Raises:
            ManifestError: an epoch after the last of ``train.epochs``, with ``compat: published``.
        """
        tokens = [part.tokens.at(epoch) for part in self.parts]
        if all(there is part.tokens for there, part in zip(tokens, self.parts, strict=True)):
            return self
        if self._other is None or any(a is not b for a, b in zip(tokens, self._other[0], strict=True)):
            parts = [replace(part, tokens=there) for part, there in zip(self.parts, tokens, strict=True)]
            self._other = tokens, Corpus(parts)
        return self._other[1]

    def place(self, number: int) -> tuple[int, int]:
        """Number of the root, and the row in its index, of a dialogue."""
        root = bisect_right(self.starts, number) - 1
        return root, number - self.starts[root]

    def key(self, number: int) -> str:
        """The key of a dialogue."""
        root, row = self.place(number)
        return self._columns[root][0][row].as_py()

    def views(self, number: int) -> list[View]:
        """What is shown of the media of a dialogue; see :meth:`Visuals.views`."""
        self._pages.looked_up()
        root, row = self.place(number)
        _, media, entry = self._columns[root]
        visuals = self.parts[root].visuals
        return visuals.views(media[row].as_py(), entry[row].as_py() if visuals.bounds else "")

    def text(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels of a dialogue, see :meth:`Tokens.of`; copies, so that no page is looked at later."""
        self._pages.looked_up()
        root, row = self.place(number)
        ids, labels = self.parts[root].tokens.of(row)
        return ids.copy(), labels.copy()

    def why(self, number: int) -> str:
        """Why a dialogue cannot be used, or what it loses, see :meth:`Tokens.why`."""
        root, row = self.place(number)
        return self.parts[root].tokens.why(row)

    def release(self) -> None:
        """Give back the memory of what was read of indexes and token caches; see :mod:`pipeline.utils.arrow_mmap`."""
        for part in self.parts:
            part.index.release()
            part.tokens.release()


def roots_of(manifest: Manifest) -> tuple[MixRoot, ...]:
    """What is read: ``mix``, or the stage's own shards once."""
    return manifest.mix or (MixRoot(root=str(manifest.shard_place)),)


def open_corpus(manifest: Manifest) -> Corpus:
    """All roots of ``manifest``, checked against it; each is tokenised once where needed.

    Raises:
        ShardsError: shards are not there, or cannot give the frames that are wanted.
        ManifestError: the tokenizer cannot be loaded, or ``mix`` names an entry that a root does not have.
    """
    roots, opened = roots_of(manifest), []
    for number, root in enumerate(roots):
        index, visuals = _open(manifest, number, root)
        index.check(manifest)
        for place, entry in enumerate(root.entries):
            index.check_frames(entry.frames(manifest.frames), f"mix[{number}].entries[{place}]")
        opened.append((index, visuals))
    conversation = conversation_of(manifest)
    parts = [Part(index, visuals, Tokens(index, manifest, conversation, visuals)) for index, visuals in opened]
    for number, (root, part) in enumerate(zip(roots, parts, strict=True)):
        _check_entries(number, root, part)
    return Corpus(parts)


def open_pictures(manifest: Manifest) -> Pictures:
    """The pixels alone, of roots that :func:`open_corpus` has checked; ShardsError if they cannot be opened."""
    return Pictures([_open(manifest, number, root)[1] for number, root in enumerate(roots_of(manifest))])


def _open(manifest: Manifest, number: int, root: MixRoot) -> tuple[Index, Visuals]:
    index = Index.open(root.root, Reading.of(manifest.loader))
    return index, Visuals(index, manifest, root.entries, number)


def _check_entries(number: int, root: MixRoot, part: Part) -> None:
    there = part.entry_names() if root.entries else []
    for place, entry in enumerate(root.entries):
        if entry.entry not in there:
            near = difflib.get_close_matches(entry.entry, there, n=1, cutoff=0.5)
            hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(there[:8])}"
            raise ManifestError(f"mix[{number}].entries[{place}].entry: {root.root} has no {entry.entry}; {hint}")
