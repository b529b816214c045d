"""Upload a shard root: its files in order, and what may be replaced where a root is already."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa

from framestream.pipeline.shards.dataset_card import (
    CARD_FILE,
    MAX_CARD_BYTES,
    CardError,
    decode_card,
    merge_cards,
    read_card,
    render_dataset_card,
)
from framestream.pipeline.shards.index import FILES
from framestream.pipeline.shards.ledger import LEDGER_FILE
from framestream.pipeline.upload.files import RefusedError, UploadFile
from framestream.pipeline.upload.transfer import TransferResult, UploadTarget, transfer
from framestream.pipeline.utils.records import read_record

CARD_STAGE = 2  #: of the files of a root
SIDECARS = (
    "shardindex.json",
    "shardindex-val.json",
    ".nv-meta/.info.json",
    ".nv-meta/split.yaml",
    ".nv-meta/dataset.yaml",
)
#: files that an addition to a root changes; the shards themselves stay as they are
_CHANGING = re.compile(
    r"README\.md|build\.json|index/.*|ledger/ledger\.parquet|(?:video|image|dialogue)/(?:\.nv-meta/.*|shardindex.*|.*\.tar\.idx)"
)


def push_root(root: Path, target: UploadTarget, replace: bool = False) -> TransferResult:
    """Upload a finished root that was verified. Shards that are there are not sent again.

    Readers see a complete root or none: ``build.json`` comes last, and the card just before it.

    Args:
        replace: remove another root, or other files, that are there.

    Raises:
        RefusedError: another root is there, and not ``replace``, or the card cannot be merged with the one there.
        UploadError, OSError: it failed. Repeated, it continues.
    """
    stages = list_root_files(root)
    stored = target.list_files([file for stage in stages for file in stage])
    card = stages[CARD_STAGE][0]
    if CARD_FILE in stored and not replace and not stored[CARD_FILE].is_copy_of(card):
        if stored[CARD_FILE].size > MAX_CARD_BYTES:
            fault = f"{target.display_url}/{CARD_FILE}: the card there has over {MAX_CARD_BYTES:,} bytes"
            raise RefusedError(f"{fault}; make it shorter, or pass --replace to remove what is there")
        stages[CARD_STAGE] = [_merge(root, card, target)]
    return transfer(stages, target, stored, lambda name: _CHANGING.fullmatch(name) is not None, replace)


def list_root_files(root: Path) -> list[list[UploadFile]]:
    """List the files of a finished root: shards, files beside them with the index, the card, build.json.

    Token caches and other files that the format does not name are left out. A root without a card gets one here.

    Raises:
        RefusedError: the card cannot be read.
        OSError: a file is missing.
    """
    tables = {}
    for name in FILES:
        with pa.memory_map(str(root / "index" / f"{name}.arrow")) as source:
            tables[name] = pa.ipc.open_file(source).read_all()
    shards, reader_files = [], []
    rows = tables["shards"].select(["folder", "name", "sha256"]).to_pylist()
    for row in rows:
        name = f"{row['folder']}/{row['name']}"
        shards.append(UploadFile(name, root / name, row["sha256"]))
        if (root / f"{name}.idx").is_file():
            shards.append(UploadFile(f"{name}.idx", root / f"{name}.idx"))
    for folder in dict.fromkeys(row["folder"] for row in rows):
        for name in SIDECARS:
            if (root / folder / name).is_file():
                reader_files.append(UploadFile(f"{folder}/{name}", root / folder / name))
    reader_files += [
        UploadFile(name, root / name) for name in (LEDGER_FILE, *(f"index/{name}.arrow" for name in FILES))
    ]
    try:
        card = read_card(root / CARD_FILE)
    except CardError as error:
        raise RefusedError(f"{root / CARD_FILE}: {error}") from None
    if not card:
        record = read_record(root / "build.json", "build record", "build the root again")
        card = render_dataset_card(record, tables["shards"], tables["media"])
    source = root / CARD_FILE if (root / CARD_FILE).exists() else card.encode()
    return [shards, reader_files, [UploadFile(CARD_FILE, source)], [UploadFile("build.json", root / "build.json")]]


def _merge(root: Path, card: UploadFile, target: UploadTarget) -> UploadFile:
    """Return the card with what users wrote in the one of the target."""
    with card.open() as file:
        text = decode_card(file.read())
    try:
        merged = merge_cards(text, decode_card(target.read(CARD_FILE)))
    except CardError as error:
        fault = f"{target.display_url}/{CARD_FILE}, the card there, and {root / CARD_FILE}"
        raise RefusedError(f"{fault}: {error}; or pass --replace to remove what is there") from None
    return UploadFile(CARD_FILE, merged.encode()) if merged != text else card
