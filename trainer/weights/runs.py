"""Find the folder of weights of a run, and the files that its manifest names, from any current folder."""

from __future__ import annotations

import dataclasses
import logging
import shlex
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import ModelConfig
from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.config.yaml_files import load_yaml
from framestream.pipeline.utils.paths import PathError, expand_path, is_address
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE, ReleaseConfig, is_hf_release, parse_hf_config
from framestream.trainer.weights.tensor_files import WeightsError
from framestream.trainer.weights.tensor_reader import native_config, read_config

MAX_STEPS = 5  #: checkpoints of a run in a message
RANDOM = "random"  #: value of a field of ``init_from`` that names no path, also where there is a folder of that name

logger = logging.getLogger(__name__)


def resolve_weights(checkpoint: str | Path) -> Path:
    """Return the folder of weights of a finished run, or ``checkpoint`` itself if that is one.

    Raises:
        WeightsError: there are no weights, or it is a checkpoint, which must be exported first.
    """
    if is_address(str(checkpoint)):
        raise WeightsError(f"{checkpoint}: is an address; give a folder on this machine")
    try:
        checkpoint = Path(expand_path(str(checkpoint)))
    except PathError as error:
        raise WeightsError(str(error)) from None
    weights = checkpoint if (checkpoint / "config.json").is_file() else checkpoint / "final"
    if not (weights / "config.json").is_file():
        if (checkpoint / "state.json").is_file() or is_pointer(checkpoint):
            command = f"python -m trainer.export --checkpoint {shlex.quote(str(checkpoint))} --out DIR"
            raise WeightsError(f"{checkpoint}: it is a checkpoint; export it first: {command}")
        fix = describe_steps(checkpoint) or "no weights there; name a finished run, or a folder of weights"
        raise WeightsError(f"{checkpoint}: {fix}")
    return weights


def is_pointer(path: Path) -> bool:
    """Return whether ``path`` is the file RUN/checkpoints/latest or RUN/checkpoints/best, which names a checkpoint."""
    return path.name in ("latest", "best") and path.parent.name == "checkpoints" and path.is_file()


def describe_steps(path: Path) -> str:
    """Return which checkpoints a run has, if ``path`` is missing in its ``checkpoints``; empty for other paths."""
    if path.parent.name != "checkpoints" or path.exists():
        return ""
    steps = [folder.parent.name for folder in path.parent.glob("step-*/state.json")]
    numbers = sorted(int(name[5:]) for name in steps if name[5:].isdecimal() and len(name) < 20)
    if not numbers:
        return ""
    listed = ", ".join(f"step-{number:06d}" for number in numbers[-MAX_STEPS:])
    newest = f"the newest of {len(numbers)} are" if len(numbers) > MAX_STEPS else f"{path.parent} has"
    return f"no such checkpoint; {newest} {listed}"


def run_of_weights(weights: Path) -> Path | None:
    """Return the folder of the run whose final weights are in ``weights``.

    Returns:
        the folder above; None for an export, a released checkpoint, and other folders of weights.

    Raises:
        WeightsError: config.json is damaged.
    """
    folder = weights if weights.name else weights.absolute()
    return folder.parent if folder.name == "final" and native_config(folder) else None


def parse_model(config: dict, where: str) -> tuple[ModelConfig, int, int]:
    """Parse a config.json of ours or of a release: the model, pixels along a side of a frame, frames of a clip.

    Raises:
        WeightsError: it is that of another model; names ``where``.
        ManifestError: it describes a model that cannot be built here.
    """
    if is_hf_release(config):
        return parse_hf_config(config, where)
    if (kind := config.get("model_type")) != NATIVE_MODEL_TYPE:
        raise WeightsError(f"{where}: model_type is {kind!r}, neither framestream's nor a released checkpoint's")
    own = ReleaseConfig.from_config(config, "", where)
    return own.model, own.frames.size, own.frames.clip_frames


def warn_of_frame_size(weights: Path, manifest: Manifest) -> None:
    """Log a warning if frames are shown in another size than that in the config.json of the weights.

    Raises:
        WeightsError: config.json is damaged, or another model's.
        ManifestError: it describes a model that cannot be built here.
    """
    where = str(weights / "config.json")
    _, size, _ = parse_model(read_config(weights), where)
    if size != manifest.frames.size:
        logger.warning("%s: frames.size is %d; the manifest's %d is used", where, size, manifest.frames.size)


def stored_manifest(weights: Path) -> Path | None:
    """Return the ``manifest.yaml`` beside or in a folder of weights; None if there is none."""
    candidates = (weights.parent / "manifest.yaml", weights / "manifest.yaml")
    return next((path for path in candidates if path.is_file()), None)


def trained_frames(weights: Path) -> int | None:
    """Return the most frames of a video that a model was trained with; None if no manifest beside it says so."""
    path = stored_manifest(weights)
    try:
        frames = load_yaml(path)["frames"]["max"] if path else None
    except (ManifestError, KeyError, TypeError, ValueError, RecursionError):
        return None
    return int(frames) if isinstance(frames, int) else None


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


def resolve_init_source(manifest: Manifest, part: str) -> tuple[str, str]:
    """Find what a part starts from.

    Returns:
        the manifest's field that says so, and an address for ``locate_weights``, or ``random``.

    Raises:
        WeightsError: ``init_from.run`` is a run that is not finished.
    """
    init = manifest.init_from
    if address := getattr(init, part):
        return f"init_from.{part}", address
    return "init_from.run", _run_weights(init.run) if init.run else RANDOM


def _run_weights(run: str) -> str:
    """Return the folder of final weights of a run; the address of a released checkpoint is returned unchanged."""
    folder = Path(run)
    if run.startswith("hf:") or (not (folder / "final").exists() and (folder / "config.json").is_file()):
        return run
    if not folder.is_dir():
        raise WeightsError(f"init_from.run: {run}: no such folder, nor a stage of that name; train that stage first")
    if (folder / "checkpoints" / "latest").exists() and not (folder / "final").exists():
        raise WeightsError(f"init_from.run: {run}: has checkpoints and no final weights; finish that stage first")
    return str(folder / "final")
