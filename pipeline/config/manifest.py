"""The manifest: one typed YAML file that drives building, reading and training of a stage.

``load_manifest`` reads, validates and freezes it; ``python -m trainer --manifest M --dry-run`` prints it with every
default resolved. Relative paths in a manifest are relative to the current directory, except ``extends``, which is
relative to the manifest that names it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path

from framestream.pipeline.config.data import DataConfig, MixRootConfig
from framestream.pipeline.config.loading import BatchingConfig, LoaderConfig
from framestream.pipeline.config.model import TOKENS_PER_TILE, InitFromConfig, ModelConfig
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig, TextConfig
from framestream.pipeline.config.schema import ManifestError, spec, from_dict, to_dict
from framestream.pipeline.config.training import EvaluateConfig, TrainConfig
from framestream.pipeline.config.yaml_files import apply_override, read_yaml

__all__ = ["Manifest", "ManifestError", "load_manifest", "to_dict"]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One stage, whole."""

    stage: int = field(metadata=spec(choices=(1, 2, 3, 4)))
    output: str = field(metadata=spec(doc="folder of the run: checkpoints, logs, final weights"))
    data: DataConfig
    frames: FramesConfig
    text: TextConfig
    batching: BatchingConfig
    train: TrainConfig
    init_from: InitFromConfig
    name: str = ""
    seed: int = field(default=0, metadata=spec(low=0))
    shards: str = field(
        default="shards", metadata=spec(doc="stage N is read from SHARDS/stageN; a folder or an address")
    )
    compat: str = field(
        default="none",
        metadata=spec(choices=("none", "published"), doc="published: with the published readers' faults"),
    )
    images: ImagesConfig = ImagesConfig()
    mix: tuple[MixRootConfig, ...] = ()
    loader: LoaderConfig = LoaderConfig()
    model: ModelConfig = ModelConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def __post_init__(self) -> None:
        patch, size = self.model.vision_tower.patch, self.frames.size
        if size % patch:
            raise ManifestError(f"frames.size: {size} is not a multiple of model.vision_tower.patch ({patch})")
        if (size // patch) ** 2 < TOKENS_PER_TILE:
            raise ManifestError(f"frames.size: {size} gives {(size // patch) ** 2} patches; a tile needs at least 64")
        longest, positions = self.text.max_tokens, self.model.language_model.max_position_embeddings
        if longest > positions:
            limit = f"model.language_model.max_position_embeddings ({positions})"
            raise ManifestError(f"text.max_tokens: {longest} is more than {limit}; lower it or raise that")
        if self.mix and self.batching.order == "modality_length":
            raise ManifestError(
                "batching.order: modality_length drops another number of dialogues of a mix in each epoch; use modality"
            )
        named = self.init_from
        if not named.run and not (named.vision_tower and named.language_model):
            raise ManifestError("init_from: name a run, or vision_tower and language_model")
        if named.run and Path(named.run) == Path(self.output):
            raise ManifestError(f"init_from.run: {named.run} is this run's own output; name the stage before it")
        self._check_mix()

    def _check_mix(self) -> None:
        roots, weights = [root.root.rstrip("/") for root in self.mix], [root.weight for root in self.mix]
        for number, root in enumerate(self.mix):
            if roots[number] in roots[:number]:
                raise ManifestError(f"mix[{number}].root: {root.root} stands twice; name each root once")
            if (root.weight is None) != (weights[0] is None):
                raise ManifestError(f"mix[{number}].weight: all roots have one, or none has; give or remove them all")
            for place, entry in enumerate(root.entries):
                try:
                    entry.bound_frames(self.frames)
                except ManifestError as error:
                    raise ManifestError(f"mix[{number}].entries[{place}].{error}") from None
        if self.mix and not any(weight is None or weight > 0 for weight in weights):
            raise ManifestError("mix[0].weight: all are 0; give at least one root a weight above 0")

    @property
    def shard_root(self) -> Path:
        """Folder that this stage's shards are built in.

        Raises:
            ManifestError: ``shards`` is an address.
        """
        if "://" in self.shards:
            raise ManifestError(f"shards: {self.shards} is an address; build in a folder and copy it there")
        return Path(self.shards) / f"stage{self.stage}"

    @property
    def shard_address(self) -> str:
        """Folder or address that this stage's shards are read from."""
        return f"{self.shards.rstrip('/')}/stage{self.stage}" if "://" in self.shards else str(self.shard_root)


def load_manifest(path: str | Path, overrides: tuple[str, ...] | list[str] = ()) -> Manifest:
    """Read, validate and freeze a manifest; ``overrides`` are ``a.b.c=VALUE`` assignments.

    A stage that ``init_from.run`` names, as ``stage2`` for the ``stage2.yaml`` beside ``path``, becomes its ``output``.

    Raises:
        ManifestError: one line naming the file, the field and the fix.
    """
    value = read_yaml(path)
    for assignment in overrides:
        value = apply_override(value, assignment)
    value = _chained(value, Path(path))
    manifest = from_dict(Manifest, value, f"{path}: ")
    return manifest if manifest.name else dataclasses.replace(manifest, name=Path(path).stem)


def _chained(value: dict, path: Path) -> dict:
    """``value`` with the output folder in place of the name of a manifest beside ``path`` in ``init_from.run``."""
    named = value.get("init_from")
    run = named.get("run") if isinstance(named, dict) else None
    if not isinstance(run, str) or not re.fullmatch(r"[\w-]+", run):
        return value
    before = path.with_name(f"{run}.yaml")
    if not before.is_file():
        return value
    output = read_yaml(before).get("output")
    if not isinstance(output, str):
        raise ManifestError(f"{path}: init_from.run: {before} has no output; give it one, or name a folder")
    return {**value, "init_from": {**named, "run": output}}
