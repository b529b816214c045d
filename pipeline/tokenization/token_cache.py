"""The token cache: every dialogue tokenised once, beside the index, so that all lengths are known before reading.

``ROOT/index/tokens-FINGERPRINT.arrow`` has one row per dialogue of the index, in its order. The fingerprint covers
the index, the tokenizer's content and every setting that ids or visual tokens depend on, so that another manifest on
the same root gets a file of its own; limits on length are applied when reading. With ``compat: published`` the time
message is said once more in every epoch, and every epoch has a file of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.shards.index import Index, ShardsError, row_values
from framestream.pipeline.shards.media_view import MediaView, MediaViews
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.utils.arrow_mmap import MappedTable

FORMAT = 1  #: raise it when the meaning of a column changes
CHUNK = 1024  #: dialogues that are tokenised at once and make one record batch
SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),  # IMAGE stands once for each medium
        ("labels", pa.list_(pa.int32())),  # IGNORE at the first place and at media
        ("length", pa.int32()),  # tokens of the dialogue, visual ones included
        ("clips", pa.int32()),  # clips of its videos
        ("tiles", pa.int32()),  # tiles of its stills
        ("learned", pa.int32()),  # labelled places
        ("error", pa.string()),  # why the dialogue cannot be used, else empty
    ]
)


def token_fingerprint(
    index: Index, manifest: Manifest, conversation: ChatTemplate, visuals: MediaViews, fetch: int = 0
) -> str:
    """Sha256 hex over all that the cached rows depend on; ``fetch`` as of :class:`Conversation`."""
    frames, text = manifest.frames, manifest.text
    content = conversation.tokenizer.backend_tokenizer.to_str()
    parts = {
        "format": FORMAT,
        "index": index.fingerprint,
        "tokenizer": hashlib.sha256(content.encode()).hexdigest(),
        "text": [text.template, text.system, text.mask_prompt_markers],
        "frames": [frames.sampler, frames.min, frames.max, frames.size, frames.clip_frames, frames.time_message],
        "images": [manifest.images.mode, manifest.images.max_grid],
        "seed": manifest.seed if frames.sampler == "rand" else 0,
        **({"fetch": fetch} if fetch else {}),
        **({"bounds": visuals.frame_bounds} if visuals.frame_bounds else {}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class TokenCache:
    """Ids, labels and lengths of every dialogue under the manifest's ``text.max_tokens`` and ``text.over_length``.

    ``length``, ``clips``, ``tiles`` and ``learned`` are int32 arrays (dialogues,). A dialogue over the limit is cut at
    its end, where that leaves all of its media and something to learn; else it is refused. ``learned`` is 0 where a
    dialogue is refused and nowhere else; ``cut`` has the rows that are cut, ascending.

    With ``compat: published`` dialogues grow with the epoch: these are the tokens of ``epoch``, by default the last of
    ``train.epochs``, in which the fewest dialogues can be used, and :meth:`at` gives those of the others.
    """

    def __init__(
        self,
        index: Index,
        manifest: Manifest,
        conversation: ChatTemplate,
        visuals: MediaViews,
        epoch: int | None = None,
    ) -> None:
        # Only the published epochs need the tokenizer again, which is large.
        self._made_of = (index, manifest, conversation, visuals) if manifest.compat == "published" else None
        self._epoch = manifest.train.epochs - 1 if epoch is None else epoch
        self._other: TokenCache | None = None
        fetch = self._epoch + 1 if manifest.compat == "published" else 0
        self.fingerprint = token_fingerprint(index, manifest, conversation, visuals, fetch)
        path = index.storage.folder / f"tokens-{self.fingerprint[:32]}.arrow"
        if not path.is_file():
            _build(path, index, conversation, visuals, fetch)
        try:
            self._mapped = MappedTable(path)
            table = self._mapped.table
        except (OSError, ValueError):
            table = None
        if table is None or table.schema != SCHEMA or len(table) != len(index.dialogues):
            raise ShardsError(f"{path}: damaged, or not the tokens of this index; remove the file, it is made again")
        self._ids, self._labels, self._error = table["ids"], table["labels"], table["error"]
        self.length, self.clips, self.tiles, self.num_label_tokens = (
            self._mapped.array(name) for name in ("length", "clips", "tiles", "learned")
        )
        self._limit, self._cuts = manifest.text.max_tokens, manifest.text.over_length == "cut"
        self.truncated = self._apply_limit()

    def for_epoch(self, epoch: int) -> TokenCache:
        """The tokens of one epoch; they differ with ``compat: published`` only.

        Raises:
            ManifestError: an epoch after the last of ``train.epochs``, with ``compat: published``.
        """
        if self._made_of is None or epoch == self._epoch:
            return self
        manifest = self._made_of[1]
        if epoch >= manifest.train.epochs:
            raise ManifestError(f"train.epochs: is {manifest.train.epochs}, and compat: published has none after them")
        if self._other is None or self._other._epoch != epoch:
            self._other = TokenCache(*self._made_of, epoch)
        return self._other

    def get(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels, int32 (n,), of one dialogue, within the limit; views, not to be written to."""
        ids, kept = row_values(self._ids, row), None
        if len(ids) > self._limit - self._visual(row):
            kept = self._kept(row, ids)
        return ids[:kept], row_values(self._labels, row)[:kept]

    def skip_reason(self, row: int) -> str:
        """Why a refused dialogue is refused, or what a cut one loses."""
        ids = row_values(self._ids, row)
        length = len(ids) - int((ids == IMAGE_TOKEN_INDEX).sum()) + self._visual(row)
        if length <= self._limit:
            return self._error[row].as_py() or "the dialogue has nothing to learn"
        text = f"{length} tokens are more than text.max_tokens ({self._limit})"
        if self.num_label_tokens[row]:
            return f"{text}, and are cut to it"
        if not self._cuts:
            return text
        if self._cuts_media(ids, self._kept(row, ids)):
            return f"{text}, and cutting it would cut its media"
        return f"{text}, and nothing to learn lies within them"

    def release(self) -> None:
        """Give back the memory of what was read of the file, see :class:`framestream.pipeline.utils.arrow_mmap.MappedTable`."""
        self._mapped.drop_pages()

    def _visual(self, row: int) -> int:
        return int(self.clips[row]) * TOKENS_PER_CLIP + int(self.tiles[row]) * TOKENS_PER_TILE

    def _kept(self, row: int, ids: np.ndarray) -> int:
        """How many of ``ids`` fit the limit, if all media lie among them."""
        return max(0, self._limit - self._visual(row) + int((ids == IMAGE_TOKEN_INDEX).sum()))

    @staticmethod
    def _cuts_media(ids: np.ndarray, kept: int) -> bool:
        return bool((ids[kept:] == IMAGE_TOKEN_INDEX).any())

    def _apply_limit(self) -> np.ndarray:
        """Set the lengths of what is cut and refused; the rows of what is cut, int32."""
        over = np.flatnonzero(self.length > self._limit)
        if not self._cuts:
            self.num_label_tokens[over] = 0
            return np.empty(0, dtype=np.int32)
        cut = np.zeros(len(over), dtype=bool)
        for number, row in enumerate(over.tolist()):
            ids, labels = row_values(self._ids, row), row_values(self._labels, row)
            kept = self._kept(row, ids)
            self.num_label_tokens[row] = 0 if self._cuts_media(ids, kept) else (labels[:kept] != IGNORE_INDEX).sum()
            cut[number] = self.num_label_tokens[row] > 0
        self.length[over[cut]] = self._limit
        return over[cut].astype(np.int32)


def _build(path: Path, index: Index, conversation: ChatTemplate, visuals: MediaViews, fetch: int) -> None:
    """Write the cache under a name of its own, then rename: several processes may do it at once, with equal bytes."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                with pa.ipc.new_file(file, SCHEMA) as writer:
                    for batch in _batches(index, conversation, visuals, fetch):
                        writer.write_batch(batch)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ShardsError(f"{path.parent}: the token cache cannot be written here ({error.strerror})") from None


def _batches(index: Index, conversation: ChatTemplate, visuals: MediaViews, fetch: int) -> Iterator[pa.RecordBatch]:
    columns = index.dialogues.select(["media", "entry", "conversations"])
    total = len(columns)
    with tqdm(total=total, desc="tokens", unit="dialogue", disable=total < 20 * CHUNK, dynamic_ncols=True) as bar:
        for start in range(0, total, CHUNK):
            chunk = columns.slice(start, CHUNK)
            dialogues = zip(*(column.to_pylist() for column in chunk.columns), strict=True)
            prepared = [_prepare(conversation, visuals, *dialogue, fetch) for dialogue in dialogues]
            encoded = conversation.tokenize([[] if error else segments for segments, _, error in prepared])
            rows = [
                _row(conversation, ids, labels, views, error)
                for (ids, labels), (_, views, error) in zip(encoded, prepared, strict=True)
            ]
            yield pa.RecordBatch.from_pylist(rows, schema=SCHEMA)
            bar.update(len(rows))


def _prepare(
    conversation: ChatTemplate, visuals: MediaViews, media: list[int], entry: str, turns: str, fetch: int
) -> tuple[list, list, str]:
    try:
        views = visuals.views(media, entry)
        kinds, messages = [view.kind for view in views], [view.message for view in views]
        return conversation.segments(json.loads(turns), kinds, messages, fetch), views, ""
    except ValueError as error:
        return [], [], str(error)


def _row(conversation: ChatTemplate, ids: np.ndarray, labels: np.ndarray, views: list[MediaView], error: str) -> dict:
    if not error:
        try:
            conversation.check_placeholders(ids, views)
        except ValueError as mismatch:
            error = str(mismatch)
    if error:
        return {"ids": [], "labels": [], "length": 0, "clips": 0, "tiles": 0, "learned": 0, "error": error}
    labels[:1] = IGNORE_INDEX
    return {
        "ids": ids,
        "labels": labels,
        "length": len(ids) - len(views) + sum(view.tokens for view in views),
        "clips": sum(view.clips for view in views),
        "tiles": sum(view.tiles for view in views),
        "learned": int((labels != IGNORE_INDEX).sum()),
        "error": "",
    }
