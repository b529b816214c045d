"""Find named weights: local paths, and files of the Hugging Face hub, which are downloaded once.

    PATH                            a file or a folder
    OWNER/NAME                      the safetensors files of a repository, if there is no local folder of that name
    hf:OWNER/NAME[@REVISION]        the same, at a branch, tag or commit
    hf:OWNER/NAME[@REVISION]:FILE   one file of a repository, such as an encoder's .pt or mm_projector.bin

``HF_HOME`` names the folder for downloads, ``HF_TOKEN`` opens gated repositories. With ``HF_HUB_OFFLINE=1`` only
earlier downloads are read.
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

REPOSITORY = r"[\w-][\w.-]*/[\w.-]+"  #: OWNER/NAME; a leading dot would be a relative path
#: the forms that begin with hf:
HUB_ADDRESS = re.compile(rf"hf:(?P<name>{REPOSITORY})(?:@(?P<revision>[^:@]+))?(?::(?P<file>.+))?")


def locate_weights(address: str) -> Path:
    """Return the local path of ``address``, one of the four forms above; download it from the hub if necessary.

    Raises:
        WeightsError: one line with the address, what is wrong with it and the fix.
    """
    if address.startswith("hf:"):
        parts = HUB_ADDRESS.fullmatch(address)
        if parts is None:
            raise WeightsError(f"{address}: is not hf:OWNER/NAME, hf:OWNER/NAME:FILE or hf:OWNER/NAME@REVISION:FILE")
        return _download(address, parts["name"], parts["revision"], parts["file"])
    if Path(address).exists():
        return Path(address)
    if not re.fullmatch(REPOSITORY, address):
        raise WeightsError(f"{address}: no such file or folder")
    return _download(f"{address}: no such file or folder here, and on the hub", address, None, None)


def _download(where: str, name: str, revision: str | None, file: str | None) -> Path:
    """Download a file or the safetensors files of a repository; ``where`` begins every error."""
    try:
        if file:
            return Path(hf_hub_download(name, file, revision=revision))
        wanted = ["*.safetensors", "*.json"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # from the library, the network or the disk: no traceback for any of them
        raise WeightsError(f"{where}: {_reason(error, name, revision, file)}") from error
    if not any(folder.glob("*.safetensors")):
        raise WeightsError(f"{where}: {name} has no *.safetensors; name the file, as hf:{name}:FILE")
    return folder


def _reason(error: Exception, name: str, revision: str | None, file: str | None) -> str:
    """Describe what went wrong, and the fix, in one line."""
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
