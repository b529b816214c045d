"""Push an exported model to a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from framestream.pipeline.upload.files import RefusedError, UploadFile
from framestream.pipeline.upload.hub_repository import HubRepository
from framestream.pipeline.upload.transfer import TransferResult, transfer
from framestream.trainer.checkpoint.model_card import MODEL_CARD_FILE

CONFIG_FILE = "config.json"  #: sent last, because readers begin with it


def push_model(folder: Path, name: str, private: bool | None = None) -> TransferResult:
    """Upload an export to the model ``name``. Files that are there are not sent again.

    Args:
        folder: that :func:`framestream.trainer.checkpoint.export.export` wrote.
        name: ``OWNER/NAME``; the repository is created if it is missing.
        private: create it as private; None for the owner's default.

    Raises:
        RefusedError: the name is invalid, the folder is no export, or the repository has something else.
        UploadError, OSError: it failed. Repeated, it continues.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII):
        raise RefusedError(f"--push {name!r:.100}: not OWNER/NAME; write the name of a model of the hub")
    if not (folder / CONFIG_FILE).is_file():
        raise RefusedError(f"{folder}: no export there (no {CONFIG_FILE}); name --checkpoint to write one")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    files = [UploadFile(path.name, path) for path in paths]
    weights = [file for file in files if file.name.endswith(".safetensors")]
    others = [file for file in files if file not in weights and file.name != CONFIG_FILE]
    last = [file for file in files if file.name == CONFIG_FILE]
    target = HubRepository(name, "model", private=private)
    stored = target.list_files(files)
    card = next((file for file in others if file.name == MODEL_CARD_FILE), None)
    if card and MODEL_CARD_FILE in stored and not stored[MODEL_CARD_FILE].is_copy_of(card):
        fix = f"save it as {folder / MODEL_CARD_FILE} to keep it, or remove it there"
        raise RefusedError(f"{target.display_url}: has another {MODEL_CARD_FILE}; {fix}")
    fix = "name another address, or empty it"
    return transfer([weights, others, last], target, stored, may_replace=lambda file: False, fix=fix)
