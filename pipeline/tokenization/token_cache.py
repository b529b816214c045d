"""Token cache: every dialogue is tokenized once, so that all lengths are known before media are read.

A file of :mod:`framestream.pipeline.tokenization.token_files` has one row per dialogue of the index, in its order. Its
fingerprint covers the index, the content of the tokenizer and every setting that ids or visual tokens depend on. So
manifests that differ in these have separate files on the same root. Limits on length are applied when reading. With
``compat: published`` the time message is repeated once more in every epoch, and every epoch has a separate file.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.shards.index import Index, row_values
from framestream.pipeline.shards.media_view import MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.tokenization.token_files import open_or_write_tokens
from framestream.pipeline.tokenization.token_rows import DialogueTokenizer

FORMAT = 1  #: increase it when the meaning of a column changes


def token_fingerprint(
    index: Index, manifest: Manifest, chat_template: ChatTemplate, media_views: MediaViews, fetch: int = 0
) -> str:
    """Return the sha256, in hex, of all that the cached rows depend on; ``fetch`` as of :meth:`ChatTemplate.encode`."""
    frames, text = manifest.frames, manifest.text
    content = chat_template.tokenizer.backend_tokenizer.to_str()
    parts = {
        "format": FORMAT,
        "index": index.fingerprint,
        "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
        "text": [text.template, text.system, text.mask_prompt_markers],
        "frames": [frames.sampler, frames.min, frames.max, frames.size, frames.clip_frames, frames.time_message],
        "images": [manifest.images.mode, manifest.images.max_grid],
        "seed": manifest.seed if frames.sampler == "rand" else 0,
        **({"fetch": fetch} if fetch else {}),
        **({"bounds": media_views.frame_bounds} if media_views.frame_bounds else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """Ids, labels and lengths of every dialogue under the manifest's ``text.max_tokens`` and ``text.over_length``.

    A dialogue over the limit is truncated at its end if all of its media and at least one label remain. Otherwise it is
    excluded.

    With ``compat: published`` dialogues grow with the epoch. Then the tokens are those of ``epoch``, by default the
    last of ``train.epochs``, in which the fewest dialogues can be used. :meth:`for_epoch` gives those of other epochs.

    Attributes:
        length, clips, tiles, num_label_tokens: int32 (dialogues,). Only excluded dialogues have ``num_label_tokens`` 0.
        truncated: rows of the truncated dialogues, int32, ascending.

    Raises:
        ShardsError: there is no sound cache, and it can be written nowhere, or a process that tokenizes died.
    """

    def __init__(
        self,
        index: Index,
        manifest: Manifest,
        chat_template: ChatTemplate,
        media_views: MediaViews,
        epoch: int | None = None,
    ) -> None:
        # Only with compat: published is the tokenizer, which is large, needed for other epochs.
        self._sources = (index, manifest, chat_template, media_views) if manifest.compat == "published" else None
        self._epoch = manifest.train.epochs - 1 if epoch is None else epoch
        self._other_epoch: TokenCache | None = None
        fetch = self._epoch + 1 if manifest.compat == "published" else 0
        self.fingerprint = token_fingerprint(index, manifest, chat_template, media_views, fetch)
        self._mapped = open_or_write_tokens(
            index.storage.derived_folders,
            self.fingerprint[:32],
            len(index.dialogues),
            DialogueTokenizer(index, chat_template, media_views, fetch),
        )
        table = self._mapped.table
        self._ids, self._labels, self._error = table["ids"], table["labels"], table["error"]
        self.length, self.clips, self.tiles, self.num_label_tokens = (
            self._mapped.array(name) for name in ("length", "clips", "tiles", "learned")
        )
        self._limit, self._truncates = manifest.text.max_tokens, manifest.text.over_length == "cut"
        self.truncated = self._apply_limit()

    def for_epoch(self, epoch: int) -> TokenCache:
        """Return the tokens of one epoch; only with ``compat: published`` do they differ between epochs.

        Raises:
            ManifestError: an epoch after the last of ``train.epochs``, with ``compat: published``.
        """
        if self._sources is None or epoch == self._epoch:
            return self
        manifest = self._sources[1]
        if epoch >= manifest.train.epochs:
            raise ManifestError(
                f"train.epochs: is {manifest.train.epochs}; with compat: published there are no later epochs"
            )
        if self._other_epoch is None or self._other_epoch._epoch != epoch:
            self._other_epoch = TokenCache(*self._sources, epoch)
        return self._other_epoch

    def get(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and labels of one dialogue within the limit, int32 (n,); views that must not be modified."""
        ids, count = row_values(self._ids, row), None
        if len(ids) > self._limit - self._num_visual_tokens(row):
            count = self._num_fitting(row, ids)
        return ids[:count], row_values(self._labels, row)[:count]

    def skip_reason(self, row: int) -> str:
        """Explain why a dialogue is excluded, or that it is truncated."""
        ids = row_values(self._ids, row)
        length = len(ids) - int((ids == IMAGE_TOKEN_INDEX).sum()) + self._num_visual_tokens(row)
        if length <= self._limit:
            return self._error[row].as_py() or "the dialogue has nothing to learn"
        text = f"{length} tokens are more than text.max_tokens ({self._limit})"
        if self.num_label_tokens[row]:
            return f"{text}, and are cut to it"
        if not self._truncates:
            return text
        if self._cuts_media(ids, self._num_fitting(row, ids)):
            return f"{text}, and cutting it would cut its media"
        return f"{text}, and nothing to learn lies within them"

    def release(self) -> None:
        """Release the memory of the file, see :class:`framestream.pipeline.utils.arrow_mmap.MappedTable`."""
        self._mapped.drop_pages()

    def _num_visual_tokens(self, row: int) -> int:
        return int(self.clips[row]) * TOKENS_PER_CLIP + int(self.tiles[row]) * TOKENS_PER_TILE

    def _num_fitting(self, row: int, ids: np.ndarray) -> int:
        """Count how many of ``ids`` fit the limit, provided that all media are among them."""
        return max(0, self._limit - self._num_visual_tokens(row) + int((ids == IMAGE_TOKEN_INDEX).sum()))

    @staticmethod
    def _cuts_media(ids: np.ndarray, count: int) -> bool:
        return bool((ids[count:] == IMAGE_TOKEN_INDEX).any())

    def _apply_limit(self) -> np.ndarray:
        """Update the lengths of truncated and excluded dialogues; return the rows of truncated ones, int32."""
        over = np.flatnonzero(self.length > self._limit)
        if not self._truncates:
            self.num_label_tokens[over] = 0
            return np.empty(0, dtype=np.int32)
        truncated = np.zeros(len(over), dtype=bool)
        for number, row in enumerate(over.tolist()):
            ids, labels = row_values(self._ids, row), row_values(self._labels, row)
            count = self._num_fitting(row, ids)
            self.num_label_tokens[row] = 0 if self._cuts_media(ids, count) else (labels[:count] != IGNORE_INDEX).sum()
            truncated[number] = self.num_label_tokens[row] > 0
        self.length[over[truncated]] = self._limit
        return over[truncated].astype(np.int32)
