"""Weights that a run with adapters left where they were: their addresses in config.json, and the merge with adapters.

    FOLDER/config.json    "base": {PART: {"address": ..., "digest": ...}}

Such a run repeats no weights that it did not train. Its parts are read from the address, which must still have the
weights of the run, and the adapters in FOLDER are merged into them.
"""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.model.lora import adapted_parts
from framestream.trainer.model.parts import PARTS
from framestream.trainer.weights.adapters import adapter_folder, merge_adapters, open_adapters
from framestream.trainer.weights.hub import locate_weights
from framestream.trainer.weights.runs import RANDOM, locate_path, resolve_init_source
from framestream.trainer.weights.tensor_files import LazyTensor, WeightsError
from framestream.trainer.weights.tensor_reader import check_digest, native_config, weights_digest


def describe_bases(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Return address and digest of the weights that the final weights of a run with adapters do not repeat, by part.

    Every rank calls this. Only rank 0 needs to see the files.

    Raises:
        WeightsError: on every rank, if the weights are gone.
    """
    if not adapted_parts(manifest.train):
        return {}
    outcome: list[dict[str, dict[str, str]] | str] = [{}]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            outcome = [_describe_bases(manifest)]
        except WeightsError as error:
            outcome = [str(error)]
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if isinstance(outcome[0], str):
        raise WeightsError(outcome[0])
    return outcome[0]


def _describe_bases(manifest: Manifest) -> dict[str, dict[str, str]]:
    adapted, found = adapted_parts(manifest.train), {}
    for part in PARTS:
        if part in adapted or not getattr(manifest.train, part).train:
            _, address = resolve_init_source(manifest, part)
            if address != RANDOM:
                found[part] = {"address": address, "digest": weights_digest(locate_weights(address))}
    return found


def find_base(path: Path, part: str) -> Path | None:
    """Return where the weights of a part are that a run with adapters has left where they were, if it has.

    Raises:
        WeightsError: they are missing, or not those that the adapters were trained on.
    """
    base = native_config(path).get("base")
    entry = base.get(part) if isinstance(base, dict) else None
    if entry is None:
        return None
    address, digest = (entry.get(name) for name in ("address", "digest")) if isinstance(entry, dict) else (None, None)
    if not isinstance(address, str) or not isinstance(digest, str):
        raise WeightsError(f"{path / 'config.json'}: base.{part} is not an address and a digest")
    try:
        found = locate_weights(locate_path(address, path / "config.json"))
    except WeightsError as error:
        raise WeightsError(f"{path}: its {part} was trained on weights that are not there: {error}") from error
    if found.resolve() == path.resolve() or weights_digest(found) != digest:
        raise WeightsError(f"{path}: its {part} was trained on other weights than {address} has now; restore these")
    return found


def merge_stored(path: Path, part: str, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Merge the adapters of a part in the folder of a run into its tensors, if there are any.

    Raises:
        WeightsError: the adapters are damaged or belong to another model.
    """
    folder, config = adapter_folder(path, part), native_config(path)
    stored = config.get("digests")
    digests = {path / name: digest for name, digest in stored.items()} if isinstance(stored, dict) else {}
    files = [file for file in digests if file.parent == folder]
    if not config or not (files or folder.is_dir()):
        return tensors
    for file in files:
        check_digest(file, digests[file])
    return merge_adapters(tensors, part, open_adapters(folder), folder)
