"""The ledger: one row for everything that is not in the shards, or only in part, and why.

``ROOT/ledger/ledger.parquet`` has the columns of :data:`SCHEMA`. ``kind`` says what a row is about: a ``media`` item or
a ``dialogue`` that was left out, a ``salvaged`` media item (kept up to where its stream breaks), or a whole ``entry``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from framestream.pipeline.utils.atomic_io import atomic_file

KINDS = ("entry", "dialogue", "media", "salvaged")

#: Every reason, and what it says.
REASONS = {
    # entries
    "empty_annotation": "the annotation file holds no samples",
    "unresolved": "the annotation file or the media are not here, and the entry was left out by --skip-unresolved",
    # samples of an annotation file
    "bad_sample": "not a JSON object, or text that is none",
    "no_conversations": "no list of turns",
    "bad_turn": "a turn without a known role or without text",
    "no_answer": "no human turn is followed by an answer",
    "bad_media": "a media path or reader that is none",
    "wrong_media": "an image or a video where the entry's media_type allows none",
    "placeholder_refused": "a <video> mark, where data.text_placeholder is refuse",
    "placeholder_mismatch": "the number of <image> marks is not the number of media",
    # media
    "outside_root": "a path that leaves its root: absolute, by .. or through a link",
    "missing_file": "nothing at the path",
    "empty_file": "no bytes, or a folder without pictures",
    "not_media": "neither a video nor a picture, such as a web page",
    "no_video_stream": "a media file without pictures, such as sound alone",
    "corrupt": "cannot be decoded",
    "truncated": "ends before its first frame, or early",
    "bad_clip": "start and end are no numbers, or lie outside the video",
    "unsupported": "a kind of file that cannot be read",
    "too_few_frames": "damaged, with fewer frames before that than frames.min or one clip; or too few for whole clips",
    "timeout": "took longer than data.decode_timeout or data.fetch_timeout",
    "unreachable": "the server could not be reached or broke off, after all retries",
    "denied": "the server wants a login, a token or an accepted licence",
    "too_large": "larger than data.fetch_mb, on the server or once unpacked",
    "bad_checksum": "arrived with another checksum or length than its place states",
    "crashed": "the decoder's process died or failed without saying why",
    # dialogues, in the ledger of a run
    "unusable": "over text.max_tokens, or with nothing to learn, under the manifest of the run",
    "cut": "its end is over text.max_tokens and is not learned",
    "unreadable": "media that could not be read while training, after all retries or within loader.read_timeout",
    "not_finite": "in a global batch that was not learned, because its loss or gradient was not finite",
}

#: Reasons that may have passed; `build_shards --retry-failed` takes what has one of these.
RETRYABLE = (
    *("unresolved", "unreachable", "denied", "bad_checksum", "timeout", "crashed"),
    # the file may have been fetched again
    *("missing_file", "empty_file", "not_media", "corrupt", "truncated", "too_few_frames"),
    "too_large",  # where data.fetch_mb is another one now
)

SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("dialogue", pa.string()),  # id of the sample; empty for media and entries
        ("key", pa.string()),  # of the media item or dialogue; empty where none was given
        ("source", pa.string()),  # of the media item, or ANNOTATION#POSITION
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One row; see :data:`SCHEMA`."""

    entry: str
    kind: str
    reason: str
    message: str
    dialogue: str = ""
    key: str = ""
    source: str = ""
    attempts: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.reason not in REASONS:
            raise ValueError(
                f"{self.kind!r} with reason {self.reason!r}: not a row of pipeline/shards/ledger.py; add it there"
            )

    def columns(self) -> dict[str, str | int]:
        """The row by column; characters that UTF-8 cannot hold are escaped."""
        values = asdict(self)
        return {name: _text(value) if isinstance(value, str) else value for name, value in values.items()}


def ledger_table(rows: Iterable[LedgerRow]) -> pa.Table:
    """Rows as a table of :data:`SCHEMA`."""
    return pa.Table.from_pylist([row.columns() for row in rows], SCHEMA)


def write_ledger(path: str | Path, table: pa.Table) -> None:
    """Write a ledger as parquet, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pq.write_table(table.cast(SCHEMA), file, write_page_checksum=True)


def read_ledger(root: str | Path) -> pa.Table:
    """The ledger of a shard root."""
    return pq.read_table(Path(root) / "ledger" / "ledger.parquet", schema=SCHEMA)


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()
