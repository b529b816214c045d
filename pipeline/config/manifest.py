"""The manifest: one typed YAML file that drives building, reading and training of a stage.

``load_manifest`` reads, validates and freezes it. ``python -m trainer --manifest M --dry-run`` prints it with every
default resolved. Relative paths are relative to the current directory. Only ``extends`` and ``data.catalogs`` are
relative to the manifest that contains them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, TypeVar

from framestream.pipeline.config.data import DataConfig, MixRootConfig
from framestream.pipeline.config.loading import BatchingConfig, LoaderConfig
from framestream.pipeline.config.model import TOKENS_PER_TILE, InitFromConfig, ModelConfig
from framestream.pipeline.config.preprocessing import FramesConfig, ImagesConfig, TextConfig
from framestream.pipeline.config.schema import ManifestError, MissingFieldsError, drop_former_fields, from_dict, spec
from framestream.pipeline.config.training import EvaluateConfig, TrainConfig
from framestream.pipeline.config.yaml_files import (
    apply_override,
    locate_manifest,
    merge_mappings,
    override_name,
    read_yaml,
)
from framestream.pipeline.utils.yaml_parser import LocatedDict, find_place

__all__ = ["BuildManifest", "Manifest", "ManifestError", "load_build_manifest", "load_manifest"]

HOLDER = "x-"  #: how the names of top-level fields begin that only hold anchors


@dataclass(frozen=True, kw_only=True)
class BuildManifest:
    """The settings of shards. A manifest of shards for other trainers has no more."""

    stage: int = field(metadata=spec(choices=(1, 2, 3, 4)))
    data: DataConfig
    frames: FramesConfig
    name: str = ""
    seed: int = field(default=0, metadata=spec(low=0, high=2**63 - 1))
    shards: str = field(
        default="shards",
        metadata=spec(path="any", doc="folder or address; stage N is built to and read from SHARDS/stageN"),
    )
    compat: str = field(
        default="none",
        metadata=spec(choices=("none", "published"), doc="published: reproduce the faults of the published readers"),
    )
    images: ImagesConfig = ImagesConfig()

    @property
    def shard_root(self) -> Path:
        """Folder that the shards of this stage are built in.

        Raises:
            ManifestError: ``shards`` is an address.
        """
        if "://" in self.shards:
            raise ManifestError(
                f"shards: {self.shards} is an address; build with --out FOLDER, and upload it with push_shards"
            )
        return Path(self.shards) / f"stage{self.stage}"

    @property
    def shard_address(self) -> str:
        """Folder or address that the shards of this stage are read from."""
        return f"{self.shards.rstrip('/')}/stage{self.stage}" if "://" in self.shards else str(self.shard_root)


@dataclass(frozen=True, kw_only=True)
class Manifest(BuildManifest):
    """All settings of one stage."""

    output: str = field(metadata=spec(path="local", doc="folder of the run: checkpoints, logs, final weights"))
    text: TextConfig
    batching: BatchingConfig
    train: TrainConfig
    init_from: InitFromConfig
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
        layers = self.model.language_model.num_hidden_layers
        if self.train.recomputation(layers).layers > layers:
            level = self.train.gradient_checkpointing
            raise ManifestError(f"train.gradient_checkpointing: {level} of {layers} layers; use all")
        if self.mix and self.batching.order == "modality_length":
            raise ManifestError(
                "batching.order: modality_length drops a varying number of dialogues of a mix each epoch; use modality"
            )
        init = self.init_from
        if not init.run and not (init.vision_tower and init.language_model):
            raise ManifestError("init_from: name a run, or vision_tower and language_model")
        if init.run and Path(init.run) == Path(self.output):
            raise ManifestError(f"init_from.run: {init.run} is this run's own output; name the stage before it")
        self._check_mix()

    def _check_mix(self) -> None:
        roots, weights = [root.root.rstrip("/") for root in self.mix], [root.weight for root in self.mix]
        for number, root in enumerate(self.mix):
            if roots[number] in roots[:number]:
                raise ManifestError(f"mix[{number}].root: {root.root} is listed twice; list each root once")
            if (root.weight is None) != (weights[0] is None):
                raise ManifestError(
                    f"mix[{number}].weight: all roots have one, or none has; add or remove it everywhere"
                )
            for position, entry in enumerate(root.entries):
                try:
                    entry.bound_frames(self.frames)
                except ManifestError as error:
                    raise ManifestError(f"mix[{number}].entries[{position}].{error}") from None
        if self.mix and not any(weight is None or weight > 0 for weight in weights):
            raise ManifestError("mix[0].weight: all are 0; give at least one root a weight above 0")


Kind = TypeVar("Kind", bound=BuildManifest)
KindFn: TypeAlias = Callable[[LocatedDict], type[Kind]]  #: which kind of manifest a mapping is

OF_TRAINING = frozenset(item.name for item in dataclasses.fields(Manifest)).difference(
    item.name for item in dataclasses.fields(BuildManifest)
)  #: top-level fields that only training needs


def load_manifest(path: str | Path, overrides: Sequence[str] = (), stored: bool = False) -> Manifest:
    """Read, validate and freeze a manifest.

    ``path`` is a file, or the name of a manifest that comes with framestream, such as ``stage3`` or ``demo/stage2``.
    ``init_from.run`` may name a manifest beside ``path``, such as ``stage2`` for ``stage2.yaml``. It is replaced by the
    ``output`` of that manifest.

    Args:
        overrides: ``a.b.c=VALUE`` assignments, applied in order.
        stored: the manifest was written by a run, perhaps of an earlier version: fields that are no longer used are
            left out.

    Raises:
        ManifestError: one line naming the file, the field and the fix.
    """
    return _load(path, overrides, stored, lambda value: Manifest)


def load_build_manifest(path: str | Path, overrides: Sequence[str] = ()) -> BuildManifest:
    """Read, validate and freeze a manifest whose shards are built.

    It is a :class:`Manifest`, or only a :class:`BuildManifest` if it has none of the sections that training needs.

    Args:
        path: as for :func:`load_manifest`.
        overrides: as for :func:`load_manifest`.

    Raises:
        ManifestError: one line naming the file, the field and the fix.
    """
    return _load(path, overrides, False, _kind)


def _kind(value: LocatedDict) -> type[BuildManifest]:
    return Manifest if value.keys() & OF_TRAINING else BuildManifest


def _load(path: str | Path, overrides: Sequence[str], stored: bool, kind: KindFn[Kind]) -> Kind:
    path = locate_manifest(path)
    value = _without_holders(read_yaml(path))
    if stored:
        drop_former_fields(Manifest, value)
    changed = value
    for assignment in overrides:
        changed = apply_override(changed, assignment)
    try:
        manifest = _convert(changed, path, kind)
    except ManifestError as error:
        place = _fault_place(value, changed, path, overrides, str(error), kind)
        raise ManifestError(f"{place or path}: {error}") from None
    return manifest if manifest.name else dataclasses.replace(manifest, name=path.stem)


def _without_holders(value: LocatedDict) -> LocatedDict:
    """Return a manifest without its fields ``x-...``, which only hold anchors."""
    fields = {name: item for name, item in value.items() if not name.startswith(HOLDER)}
    return LocatedDict(fields, value.place, value.places)


def _convert(value: LocatedDict, path: Path, kind: KindFn[Kind]) -> Kind:
    """Build the manifest of a mapping. Errors begin with the field."""
    try:
        return from_dict(kind(value), _resolve_run(value, path), "")
    except MissingFieldsError as error:
        given = [name for name in value if name in OF_TRAINING]
        if kind is not _kind or error.where or not given or not OF_TRAINING.issuperset(error.names):
            raise
        others = f" like {', '.join(given[1:])}" if given[1:] else ""
        fix = f"remove {'them' if others else 'it'} to build shards only, or add {', '.join(error.names)}"
        raise ManifestError(f"{given[0]}: a field of training{others}; {fix}") from None


def _fault(value: LocatedDict, path: Path, kind: KindFn[BuildManifest]) -> str:
    """Return why a mapping is not a valid manifest; empty text if it is valid."""
    try:
        _convert(value, path, kind)
    except ManifestError as error:
        return str(error)
    return ""


def _fault_place(
    value: LocatedDict,
    changed: LocatedDict,
    path: Path,
    overrides: Sequence[str],
    error: str,
    kind: KindFn[BuildManifest],
) -> str:
    """Return the place of an error: a file and line, or the override that causes it.

    Args:
        value: the mapping of the files.
        changed: the same with the overrides.
        path: of the manifest.
        overrides: assignments, applied in order.
        error: of ``changed``.
        kind: which kind of manifest a mapping is.
    """
    place = find_place(changed, error)
    if not overrides or (before := _fault(value, path, kind)) == error:
        return find_place(value, error)
    if before:  # another fault of the files, which the overrides may have mended
        return place
    for assignment in overrides:
        value = apply_override(value, assignment)
        if _fault(value, path, kind) == error:
            return override_name(assignment)
    return place


def _resolve_run(value: LocatedDict, path: Path) -> LocatedDict:
    """Replace the name of a manifest beside ``path`` in ``init_from.run`` by its output folder."""
    init = value.get("init_from")
    run = init.get("run") if isinstance(init, dict) else None
    if not isinstance(run, str) or not re.fullmatch(r"[\w-]+", run):
        return value
    previous = path.with_name(f"{run}.yaml")
    if not previous.is_file():
        return value
    output = read_yaml(previous).get("output")
    if not isinstance(output, str):
        raise ManifestError(f"init_from.run: {previous} has no output; give it one, or name a folder")
    return merge_mappings(value, {"init_from": {"run": output}})
