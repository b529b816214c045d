"""Files of the token cache: ``tokens-FINGERPRINT-DIGEST.arrow``, whose name has the digest of its content.

They lie in the first of several folders that can be written: ``ROOT/index``, or a folder of ``loader.cache`` if the
root is read-only. A file is checked when it is opened. A damaged one is made again. Older files have no digest in their
name. They are read if their rows agree with each other.

A file is made of parts, by as many processes as there are cores. A finished part is kept beside the file as
``tokens-FINGERPRINT.FIRST-DIGEST.part``, until the file is complete. After a kill, the next process makes the rest. The
bytes of the file depend neither on the number of processes nor on interruptions.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from framestream.pipeline.config.model import TOKENS_PER_CLIP, TOKENS_PER_TILE
from framestream.pipeline.shards.index import ShardsError
from framestream.pipeline.tokenization.special_ids import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from framestream.pipeline.tokenization.token_workers import map_in_order
from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.locks import LockError, LockHeldError, lock_file
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
PART_ROWS = 8192  #: dialogues of a part: seconds of work, the most that is lost when a process is killed
PARTS_PER_PROCESS = 4  #: parts for each process, at least: starting one takes as long as a part or two
MAX_PROCESSES = 32  #: processes that tokenize at a time, at most; each takes about 0.4 GB
BAR_ROWS = 20_000  #: dialogues from which on a progress bar is shown
LEFTOVER_SECONDS = 600  #: age from which on a temporary file is that of a killed process

#: makes the rows of dialogues start to stop; picklable
Tokenize = Callable[[int, int], Iterable[pa.RecordBatch]]


def open_or_write_tokens(folders: Sequence[Path], fingerprint: str, rows: int, tokenize: Tokenize) -> MappedTable:
    """Open the token cache with ``fingerprint``. If no folder has a sound one, write it to the first that allows it.

    One process at a time writes it, and others wait for that one. Where the file system has no locks, several write
    equal bytes.

    Args:
        folders: in order of preference.
        fingerprint: of everything that the rows depend on, hexadecimal.
        rows: number of dialogues.
        tokenize: makes the rows.

    Raises:
        ShardsError: one line; no folder can be written, the disk is full, or a process that tokenizes died.
    """
    damaged: set[Path] = set()
    if found := _find(folders, fingerprint, rows, damaged):
        return found
    refused = ""
    for folder in folders:
        with _locked(folder, fingerprint, create=folder == folders[-1]):
            if found := _find([folder], fingerprint, rows, damaged):
                return found
            try:
                path = _write(folder, fingerprint, rows, tokenize)
            except OSError as error:
                # without the lock, another process may have been first, and have removed the parts
                if found := _find([folder], fingerprint, rows, damaged):
                    return found
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


def _find(folders: Sequence[Path], fingerprint: str, rows: int, damaged: set[Path]) -> MappedTable | None:
    """Open the first sound file. Damaged ones before it are named and removed; ``damaged`` has those that stay."""
    for folder in folders:
        for path in sorted({*folder.glob(f"tokens-{fingerprint}*.arrow")} - damaged):
            try:
                found = open_tokens(path, rows)
                _remove_parts(folder, fingerprint)  # of a process that was killed before it could
                return found
            except FileNotFoundError:  # another process has removed it
                continue
            except (OSError, ValueError) as error:
                _remove_damaged(path, error, "the token cache is made again")
                if path.exists():
                    damaged.add(path)
    return None


def _write(folder: Path, fingerprint: str, rows: int, tokenize: Tokenize) -> Path:
    """Write a file completely or not at all, from its parts: to a temporary one, then renamed."""
    _remove_leftovers(folder, fingerprint)
    with contextlib.closing(_parts(folder, fingerprint, rows, tokenize)) as parts:
        batches = (batch for part in parts for batch in part.to_batches())
        path = _write_batches(folder, fingerprint, batches, "-", ".arrow")
    _remove_parts(folder, fingerprint)
    _remove_leftovers(folder, fingerprint)
    return path


def _parts(folder: Path, fingerprint: str, rows: int, tokenize: Tokenize) -> Generator[pa.Table, None, None]:
    """Yield all parts in order. Those that no earlier process has finished are made, and then kept."""
    ranges = [(start, min(start + PART_ROWS, rows)) for start in range(0, rows, PART_ROWS)]
    finished = _finished_parts(folder, fingerprint, dict(ranges))
    missing = [part for part in ranges if part[0] not in finished]
    processes = min(len(os.sched_getaffinity(0)), len(missing) // PARTS_PER_PROCESS, MAX_PROCESSES)
    kept = sum(stop - start for start, stop in ranges if start in finished)
    if kept:
        logger.info("%s: %d of %d dialogues are tokenized, going on with the rest", folder, kept, rows)
    writer = _PartWriter(folder, fingerprint, tokenize)
    bar = tqdm(total=rows, initial=kept, desc="tokens", unit="dialogue", disable=rows < BAR_ROWS, dynamic_ncols=True)
    with bar, contextlib.closing(map_in_order(writer, missing, processes)) as made:
        for start, stop in ranges:
            if start in finished:
                yield MappedTable(finished[start], checked=True).table
            else:
                yield MappedTable(next(made), checked=True).table
                bar.update(stop - start)


@dataclass(frozen=True)
class _PartWriter:
    """Tokenizes a range of dialogues and keeps the result as a part; picklable."""

    folder: Path
    fingerprint: str
    tokenize: Tokenize

    def __call__(self, start: int, stop: int) -> Path:
        """Write the part of dialogues ``start`` to ``stop`` completely or not at all; return its path."""
        batches = self.tokenize(start, stop)
        return _write_batches(self.folder, self.fingerprint, batches, f".{start:09d}-", ".part")


def _write_batches(folder: Path, fingerprint: str, batches: Iterable[pa.RecordBatch], infix: str, suffix: str) -> Path:
    """Write ``tokens-FINGERPRINT``, ``infix``, the digest of its content and ``suffix`` completely or not at all."""
    with _temporary(folder, fingerprint) as temporary:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, SCHEMA) as writer:
                for batch in batches:
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        path = folder / f"tokens-{fingerprint}{infix}{file_digest(temporary)}{suffix}"
        os.replace(temporary, path)
    return path


def _finished_parts(folder: Path, fingerprint: str, stops: dict[int, int]) -> dict[int, Path]:
    """Find the sound parts, by their first dialogue. Damaged ones are named and removed.

    Args:
        stops: first dialogue of a part -> the one after its last.
    """
    finished = {}
    for path in sorted(folder.glob(f"tokens-{fingerprint}.*.part")):
        name = re.fullmatch(r"tokens-[0-9a-f]+\.([0-9]+)-([0-9a-f]{16})\.part", path.name)
        start = int(name[1]) if name else -1
        if name is None or start not in stops:
            continue
        try:
            table = MappedTable(path, name[2]).table
            if table.schema != SCHEMA or len(table) != stops[start] - start:
                raise ValueError(f"{path}: not a part of these tokens")
            finished[start] = path
        except FileNotFoundError:  # another process has completed the file
            continue
        except (OSError, ValueError) as error:
            _remove_damaged(path, error, "its dialogues are tokenized again")
    return finished


def _remove_damaged(path: Path, error: OSError | ValueError, consequence: str) -> None:
    """Name a file that cannot be used, and remove it if that is possible."""
    logger.warning("%s; %s", f"{path}: {error.strerror}" if isinstance(error, OSError) else error, consequence)
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_parts(folder: Path, fingerprint: str) -> None:
    for path in folder.glob(f"tokens-{fingerprint}.*.part"):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _temporary(folder: Path, fingerprint: str) -> Iterator[Path]:
    """Yield a path that no other process uses; what is still there afterwards is removed."""
    path = folder / f"tokens-{fingerprint}.{uuid.uuid4().hex}.tmp"
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_leftovers(folder: Path, fingerprint: str) -> None:
    """Remove the temporary files of processes that were killed; a live process writes its own all the time."""
    for path in folder.glob(f"tokens-{fingerprint}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


@contextlib.contextmanager
def _locked(folder: Path, fingerprint: str, create: bool) -> Iterator[None]:
    """Let one process at a time write the tokens of ``folder``, which is created if ``create``."""
    path = folder / f"tokens-{fingerprint}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, LockError):  # without the lock, several write equal bytes
            if create:
                folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock_file(path, "loader that tokenizes"))
            except LockHeldError as error:
                logger.info("%s", str(error).rpartition("; ")[0] + "; waiting for its tokens")
                stack.enter_context(lock_file(path, "loader", wait=True))
            stack.callback(path.unlink, missing_ok=True)
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
