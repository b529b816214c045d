"""Where named weights lie on this machine: local paths, and files of the hub, which are fetched once.

    PATH                            a file or a folder
    OWNER/NAME                      the safetensors files of a repository, where no such folder is here
    hf:OWNER/NAME[@REVISION]        the same, at a branch, tag or commit
    hf:OWNER/NAME[@REVISION]:FILE   one file of a repository, such as an encoder's .pt or mm_projector.bin

``HF_HOME`` says where fetched files are kept, ``HF_TOKEN`` opens gated repositories, ``HF_HUB_OFFLINE=1`` reads only
what was fetched before.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from framestream.trainer.weights.tensor_files import WeightsError

REPOSITORY = r"[\w-][\w.-]*/[\w.-]+"
HUB_ADDRESS = re.compile(rf"hf:(?P<name>{REPOSITORY})(?:@(?P<revision>[^:@]+))?(?::(?P<file>.+))?")


def locate_weights(place: str) -> Path:
    """Local path of ``place``, one of the four forms above; what is on the hub is fetched unless it was before.

    Raises:
        WeightsError: one line with the place, what is wrong with it and the fix.
    """
    if place.startswith("hf:"):
        named = HUB_ADDRESS.fullmatch(place)
        if named is None:
            raise WeightsError(f"{place}: is not hf:OWNER/NAME, hf:OWNER/NAME:FILE or hf:OWNER/NAME@REVISION:FILE")
        return _fetch(place, named["name"], named["revision"], named["file"])
    if Path(place).exists():
        return Path(place)
    if not re.fullmatch(REPOSITORY, place):
        raise WeightsError(f"{place}: no such file or folder")
    return _fetch(f"{place}: no such file or folder here, and on the hub", place, None, None)


def _fetch(where: str, name: str, revision: str | None, file: str | None) -> Path:
    try:
        if file:
            return Path(hf_hub_download(name, file, revision=revision))
        patterns = {"allow_patterns": ["*.safetensors", "*.json"], "ignore_patterns": ["*/*"]}
        folder = Path(snapshot_download(name, revision=revision, **patterns))
    except Exception as error:  # of the library, the network or the disk: none may end in a traceback
        raise WeightsError(f"{where}: {_reason(error, name, revision, file)}") from error
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{where}: {name} has no *.safetensors; name the file, as hf:{name}:FILE")
    return folder


def _reason(error: Exception, name: str, revision: str | None, file: str | None) -> str:
    """What went wrong, and the fix, in one line."""
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return f"{name} is gated; accept its terms on the hub and set HF_TOKEN to your token"
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision}"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no repository {name}, or it is private; correct the name or set HF_TOKEN to your token"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{name} was not fetched before and the hub cannot be reached (network, HF_ENDPOINT, HF_HUB_OFFLINE)"
    if isinstance(error, EntryNotFoundError):
        return f"{name} has no file {file}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"cannot be fetched ({getattr(error, 'strerror', None) or lines[0]})"
