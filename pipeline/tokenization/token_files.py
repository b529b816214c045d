"""Files of the token cache: ``tokens-FINGERPRINT-DIGEST.arrow``, whose name has the digest of its content.

They lie in the first of several folders that can be written: ``ROOT/index``, or a folder of ``loader.cache`` if the
root is read-only. A file is checked when it is opened. A damaged one is made again. Older files have no digest in their
name. They are read if their rows agree with each other.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.locks import LockError, lock_file
from framestream.pipeline.utils.records import warn_without_digest

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("ids", pa.list_(pa.int32())),  # IMAGE_TOKEN_INDEX once per media item
        ("labels", pa.list_(pa.int32())),  # IGNORE_INDEX at the first position and at media
        ("length", pa.int32()),  # tokens of the dialogue, with visual tokens
        ("clips", pa.int32()),  # clips of its videos
        ("tiles", pa.int32()),  # tiles of its images
        ("learned", pa.int32()),  # number of labeled tokens
        ("error", pa.string()),  # why the dialogue cannot be used, else empty
    ]
)
#: errors after which the next folder is tried: the folder cannot be written by this user
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
LOCK = "lock"  #: file in the last folder, which the process that writes there has locked


def open_or_write_tokens(
    folders: Sequence[Path], fingerprint: str, rows: int, batches: Callable[[], Iterator[pa.RecordBatch]]
) -> MappedTable:
    """Open the token cache with ``fingerprint``. If no folder has a sound one, write it to the first that allows it.

    Processes that write to the same folder of a root at the same time write equal bytes. In the last folder, which is
    in ``loader.cache``, only one of them writes, and the others wait for it.

    Args:
        folders: in order of preference.
        fingerprint: of everything that the rows depend on, hexadecimal.
        rows: number of dialogues.
        batches: makes the rows.

    Raises:
        ShardsError: one line; no folder can be written, or the disk is full.
    """
    if found := _find(folders, fingerprint, rows):
        return found
    refused = ""
    for folder in folders:
        shared = folder == folders[-1]
        with _locked(folder) if shared else contextlib.nullcontext():
            if shared and (found := _find([folder], fingerprint, rows)):
                return found
            try:
                path = _write(folder, fingerprint, batches())
            except OSError as error:
                refused += f"{'; ' if refused else ''}{folder}: cannot be written ({error.strerror or error})"
                if error.errno in READ_ONLY and folder != folders[-1]:
                    continue
                break
            if refused:
                logger.warning("%s; the token cache is %s", refused, path)
            return open_tokens(path, rows)
    raise ShardsError(f"the token cache cannot be stored: {refused}; set loader.cache to a folder with room")


def open_tokens(path: Path, rows: int) -> MappedTable:
    """Open one file of the token cache, and check it.

    Args:
        path: of the file; its name has the digest, or is that of an older file.
        rows: number of dialogues of the index.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or belongs to another index; one line that names it.
    """
    digest = re.fullmatch(r"tokens-[0-9a-f]+-([0-9a-f]{16})\.arrow", path.name)
    mapped = MappedTable(path, digest and digest[1])
    if mapped.table.schema != SCHEMA or len(mapped.table) != rows:
        raise ValueError(f"{path}: not the tokens of this index")
    if not digest:
        if not all(map(_agrees, mapped.table.to_batches())):
            raise ValueError(f"{path}: damaged (its rows contradict each other)")
        mapped.drop_pages()
        warn_without_digest(str(path))
    return mapped


def _find(folders: Sequence[Path], fingerprint: str, rows: int) -> MappedTable | None:
    """Open the first sound file. Damaged ones before it are named and removed."""
    for folder in folders:
        for path in sorted(folder.glob(f"tokens-{fingerprint}*.arrow")):
            try:
                return open_tokens(path, rows)
            except FileNotFoundError:  # another process has removed it
                continue
            except (OSError, ValueError) as error:
                reason = f"{path}: {error.strerror}" if isinstance(error, OSError) else str(error)
                logger.warning("%s; the token cache is made again", reason)
                with contextlib.suppress(OSError):
                    path.unlink()
    return None


def _write(folder: Path, fingerprint: str, batches: Iterator[pa.RecordBatch]) -> Path:
    """Write a file completely or not at all: to a temporary one with a unique name, then renamed."""
    temporary = folder / f"tokens-{fingerprint}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"tokens-{fingerprint}-{file_digest(temporary)}.arrow"
        os.replace(temporary, path)
        return path
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time write the tokens in a folder of ``loader.cache``."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, LockError):  # without the lock, several write equal bytes
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(folder / LOCK, "loader", wait=True))
        yield


def _agrees(batch: pa.RecordBatch) -> bool:
    """Return whether the columns of some rows agree: numbers, labels and lengths follow from the ids."""
    ids, labels = batch["ids"], batch["labels"]
    columns = [*batch.columns, ids.flatten(), labels.flatten()]
    if any(column.null_count for column in columns) or not ids.value_lengths().equals(labels.value_lengths()):
        return False
    tokens, targets = ids.flatten().to_numpy(), labels.flatten().to_numpy()
    row = np.repeat(np.arange(len(batch)), ids.value_lengths().to_numpy())
    marks = np.bincount(row, tokens == IMAGE_TOKEN_INDEX, len(batch))
    learned = np.bincount(row, targets != IGNORE_INDEX, len(batch))
    length, clips, tiles, stated = (batch[name].to_numpy() for name in ("length", "clips", "tiles", "learned"))
    text = np.bincount(row, minlength=len(batch)) - marks
    return bool(
        ((tokens >= 0) | (tokens == IMAGE_TOKEN_INDEX)).all()
        and ((targets == tokens) | (targets == IGNORE_INDEX)).all()
        and (learned == stated).all()
        and (np.minimum(clips, tiles) >= 0).all()
        and (length == text + clips * TOKENS_PER_CLIP + tiles * TOKENS_PER_TILE).all()
    )
