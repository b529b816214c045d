"""The ledger: one row, with the reason, for everything that is missing from the shards or stored only in part.

``ROOT/ledger/ledger.parquet`` has the columns of :data:`SCHEMA`. ``kind`` says what a row is about: a ``media`` item or
a ``dialogue`` that was left out, a ``salvaged`` media item (stored up to the damage), or a complete ``entry``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from framestream.pipeline.utils.atomic_io import atomic_file
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import RecordError, parse_record

LEDGER_FILE = "ledger/ledger.parquet"  #: in a shard root
MAX_RATIO, MAX_UNPACKED = 1000, 1 << 26  #: a ledger may unpack to so many times its size, and so many bytes more

KINDS = ("entry", "dialogue", "media", "salvaged")

#: Every reason and its meaning.
REASONS = {
    # entries
    "empty_annotation": "the annotation file has no samples",
    "unresolved": "the annotation file or the media were not found, and --skip-unresolved left the entry out",
    # samples of an annotation file
    "bad_sample": "not a JSON object, or invalid text",
    "no_conversations": "no list of turns",
    "bad_turn": "a turn without a known role or without text",
    "no_answer": "no human turn is followed by an answer",
    "bad_media": "an invalid media path or reader",
    "wrong_media": "an image or a video that the entry's media_type does not allow",
    "placeholder_refused": "a <video> mark, and data.text_placeholder is refuse",
    "placeholder_mismatch": "the number of <image> marks is not the number of media",
    # media
    "outside_root": "a path outside its root: absolute, through .. or through a link",
    "missing_file": "no file at the path",
    "empty_file": "no bytes, or a folder without images",
    "not_media": "neither a video nor an image, such as a web page",
    "no_video_stream": "a media file without video, such as audio alone",
    "corrupt": "cannot be decoded",
    "truncated": "ends before its first frame, or early",
    "bad_clip": "start or end is not a number, or lies outside the video",
    "unsupported": "a file format that cannot be read",
    "too_few_frames": "damaged, with fewer frames before the damage than frames.min or one clip; or too few for a clip",
    "timeout": "took longer than data.decode_timeout or data.fetch_timeout",
    "unreachable": "the server could not be reached or closed the connection, after all retries",
    "denied": "the server requires a login, a token or an accepted license",
    "too_large": "larger than data.fetch_mb, on the server or after unpacking",
    "bad_checksum": "the checksum or length is not the one that its source states",
    "crashed": "the decoder's process died or failed without a reason",
    # dialogues, in the ledger of a run
    "unusable": "over text.max_tokens, or without a label, under the manifest of the run",
    "cut": "its end is over text.max_tokens and is not trained on",
    "unreadable": "media that could not be read while training, after all retries or within loader.read_timeout",
    "not_finite": "in a global batch that was skipped, because its loss or gradient was not finite",
}

#: Reasons that may no longer apply; `build_shards --retry-failed` tries items with one of these again.
RETRYABLE = (
    *("unresolved", "unreachable", "denied", "bad_checksum", "timeout", "crashed"),
    # the file may have been fetched again
    *("missing_file", "empty_file", "not_media", "corrupt", "truncated", "too_few_frames"),
    *("too_large", "outside_root"),  # data.fetch_mb or the root map may have changed
)

SCHEMA = pa.schema(
    [
        ("entry", pa.string()),
        ("dialogue", pa.string()),  # id of the sample; empty for media and entries
        ("key", pa.string()),  # of the media item or dialogue; empty if it has none
        ("source", pa.string()),  # of the media item, or ANNOTATION#POSITION
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("attempts", pa.int32()),
    ]
)


class LedgerError(ValueError):
    """A ledger cannot be read; one line with the file, the reason and the fix."""


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """One row of the ledger; see :data:`SCHEMA`.

    Raises:
        ValueError: an unknown kind or reason.
    """

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
                f"kind {self.kind!r} or reason {self.reason!r} is unknown; add it to pipeline/shards/ledger.py"
            )

    def columns(self) -> dict[str, str | int]:
        """Return the row by column. Characters that UTF-8 cannot encode are escaped."""
        values = asdict(self)
        return {name: _text(value) if isinstance(value, str) else value for name, value in values.items()}


def ledger_table(rows: Iterable[LedgerRow]) -> pa.Table:
    """Return rows as a table of :data:`SCHEMA`."""
    return pa.Table.from_pylist([row.columns() for row in rows], SCHEMA)


def write_ledger(path: str | Path, table: pa.Table) -> None:
    """Write a ledger as parquet, completely or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        pq.write_table(table.cast(SCHEMA), file, write_page_checksum=True)


def read_ledger(root: str | Path) -> pa.Table:
    """Read the ledger of a finished shard root, and compare it with the digest in build.json.

    Raises:
        LedgerError: there is no ledger, or it is damaged.
    """
    digests: Any = {}
    with contextlib.suppress(OSError, RecordError):  # whoever reads the record itself says what is wrong with it
        record = parse_record((Path(root) / "build.json").read_bytes(), "", "build record", "", warn=False)
        digests = record.get("digests")
    path = Path(root) / LEDGER_FILE
    return load_ledger(path, digests.get(LEDGER_FILE) if isinstance(digests, dict) else None)


def load_ledger(path: Path, digest: str | None) -> pa.Table:
    """Read the file of a ledger.

    Args:
        digest: of the file; None if it is not known.

    Raises:
        LedgerError: it is missing or damaged.
    """
    fix = "restore it from a copy, or remove the root and build it again"
    try:
        if digest is not None and file_digest(path) != digest:
            raise LedgerError(f"{path}: damaged ledger (its digest is not the one in build.json); {fix}")
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_size(file.metadata, path.stat().st_size)
            if file.schema_arrow != SCHEMA:
                raise ValueError("it does not have the columns of the format")
            table = file.read(use_threads=False)
        table.validate(full=True)
        return table
    except FileNotFoundError:
        raise LedgerError(f"{path}: no ledger here; {fix}") from None
    except LedgerError:
        raise
    except (OSError, ValueError, MemoryError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise LedgerError(f"{path}: damaged, or not a ledger ({reason[:200]}); {fix}") from None


def _check_size(metadata: pq.FileMetaData, size: int) -> None:
    """Raise ValueError if a ledger states that it unpacks to more than can be true: damage must not fill the memory."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    if (unpacked := sum(group.total_byte_size for group in groups)) > MAX_RATIO * size + MAX_UNPACKED:
        raise ValueError(f"it would unpack to {unpacked:,} bytes")


def _text(value: str) -> str:
    return value.encode("utf-8", "backslashreplace").decode()
