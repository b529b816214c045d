"""Find the folder of weights of a run, and the files that its manifest names, from any current folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.utils.paths import PathError, expand_path, is_address
from framestream.trainer.weights.tensor_files import WeightsError

RANDOM = "random"  #: value of a field of ``init_from`` that names no path, also where there is a folder of that name


def resolve_weights(checkpoint: str | Path) -> Path:
    """Return the folder of weights of a finished run, or ``checkpoint`` itself if that is one.

    Raises:
        WeightsError: there are no weights.
    """
    if is_address(str(checkpoint)):
        raise WeightsError(f"{checkpoint}: is an address; give a folder on this machine")
    try:
        checkpoint = Path(expand_path(str(checkpoint)))
    except PathError as error:
        raise WeightsError(str(error)) from None
    weights = checkpoint if (checkpoint / "config.json").is_file() else checkpoint / "final"
    if not (weights / "config.json").is_file():
        raise WeightsError(f"{checkpoint}: no weights there; name a finished run, or a folder of weights")
    return weights


def locate_paths(manifest: Manifest, file: Path) -> Manifest:
    """Resolve the relative paths of a manifest: tokenizer, shards, output, first weights; see :func:`locate_path`."""
    init = {field.name: getattr(manifest.init_from, field.name) for field in dataclasses.fields(manifest.init_from)}
    located = {
        name: locate_path(value, file) if isinstance(value, str) and value != RANDOM else value
        for name, value in init.items()
    }
    return dataclasses.replace(
        manifest,
        text=dataclasses.replace(manifest.text, tokenizer=locate_path(manifest.text.tokenizer, file)),
        shards=locate_path(manifest.shards, file),
        output=locate_path(manifest.output, file),
        init_from=dataclasses.replace(manifest.init_from, **located),
    )


def locate_path(path: str, file: Path) -> str:
    """Find a relative path in a file that may have been written for another current folder.

    The path is looked up below the folder of ``file``, and then below each folder above that. The first one where it
    exists is taken. A path that exists in none of them stays as it is, and so does one that is absolute or remote.
    """
    if not path or Path(path).is_absolute() or ":" in path:
        return path
    base = next((base for base in file.absolute().parents if (base / path).exists()), None)
    return path if base is None or base == Path.cwd() else str(base / path)
