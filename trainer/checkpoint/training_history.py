"""How weights were trained: the facts that the model card of an export states.

They come from the manifests of a run and of the runs before it. The config.json of an export keeps them, so that an
export of an export, and a run that starts from one, still have them:

    "framestream": {..., "training": {"base_models": ["Qwen/Qwen2-7B-Instruct"], "runs": [{"stage": 2, ...}, ...]}}
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.schema import ManifestError, drop_former_fields, from_dict, spec, to_dict
from framestream.pipeline.config.training import PartConfig
from framestream.trainer.checkpoint.released import is_released
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE
from framestream.trainer.weights.runs import locate_paths
from framestream.trainer.weights.tensor_files import WeightsError
from framestream.trainer.weights.tensor_reader import read_config

logger = logging.getLogger(__name__)

FIELD = "training"  #: of the section ``framestream`` of config.json
MAX_RUNS = 16  #: that are followed from one to the one before
MAX_NAMES = 64  #: of base models
_HUB_NAME = re.compile(r"(?:hf:)?([\w-][\w.-]{0,95}/[\w-][\w.-]{0,95})(?:@[^:/\s]+)?(?::[^\s]+)?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One run that trained the weights."""

    stage: int = field(metadata=spec(low=1, high=4))
    entries: int = field(metadata=spec(low=1, high=10**9))
    epochs: int = field(metadata=spec(low=1, high=10**9))
    global_batch: int = field(metadata=spec(low=1, high=10**9))
    max_tokens: int = field(metadata=spec(low=1, high=10**9))
    vision_tower: PartConfig
    connector: PartConfig
    language_model: PartConfig


@dataclass(frozen=True, kw_only=True)
class TrainingHistory:
    """What is known about the training of weights; empty if nothing is.

    Attributes:
        base_models: hub names of the weights at the beginning.
        runs: the newest first.
    """

    base_models: tuple[str, ...] = ()
    runs: tuple[TrainedRun, ...] = ()

    def __post_init__(self) -> None:
        if len(self.runs) > MAX_RUNS:
            raise ManifestError(f"runs: {len(self.runs):,} are too many, over {MAX_RUNS}; remove some")
        if len(self.base_models) > MAX_NAMES:
            raise ManifestError(f"base_models: {len(self.base_models):,} are too many, over {MAX_NAMES}; remove some")
        for name in self.base_models:
            match = _HUB_NAME.fullmatch(name)
            if not match or match[1] != name:
                raise ManifestError(f"base_models: {name!r:.60} is no OWNER/NAME of the hub; remove it")

    def before(self, later: TrainingHistory) -> TrainingHistory:
        """Return this history with that of ``later`` runs, which started from it."""
        names = dict.fromkeys((*later.base_models, *self.base_models))
        return TrainingHistory(base_models=(*names,)[:MAX_NAMES], runs=(*later.runs, *self.runs)[:MAX_RUNS])

    def to_section(self) -> dict:
        """Return what config.json of an export keeps in its section ``framestream``; empty if nothing is known."""
        return {FIELD: to_dict(self)} if self.runs or self.base_models else {}


def find_history(checkpoint: Path) -> TrainingHistory:
    """Find what is known about the training of a run, its final weights, one of its checkpoints, or an export.

    The runs that it continues are followed, as far as their manifests are there. Damaged ones, and what they continue,
    are named in the log and left out.
    """
    try:
        if is_released(checkpoint):
            return _exported_history(checkpoint)
    except (ManifestError, WeightsError) as error:
        return _without(error)
    history = TrainingHistory()
    folders = [checkpoint, checkpoint.parent, checkpoint.parent.parent]
    run = next((folder for folder in folders if (folder / "manifest.yaml").is_file()), None)
    while run is not None and len(history.runs) < MAX_RUNS:
        try:
            if not (run / "manifest.yaml").is_file():
                return _exported_history(run).before(history) if is_released(run) else history
            manifest = locate_paths(load_manifest(run / "manifest.yaml", stored=True), run / "manifest.yaml")
            history = _history_of(manifest).before(history)
        except (ManifestError, WeightsError) as error:
            return _without(error, history)
        start = manifest.init_from.run
        run = Path(start) if start and ":" not in start else None
    return history


def _without(error: Exception, found: TrainingHistory | None = None) -> TrainingHistory:
    """Log why something is left out of the history; return what was ``found`` before."""
    logger.warning("%s; the model card does not describe this training", error)
    return found or TrainingHistory()


def _exported_history(folder: Path) -> TrainingHistory:
    """Read what the config.json of an export keeps.

    Raises:
        ManifestError, WeightsError: it is damaged.
    """
    own = read_config(folder).get(NATIVE_MODEL_TYPE)
    stored = own.get(FIELD, {}) if isinstance(own, dict) else {}
    runs = stored.get("runs") if isinstance(stored, dict) else None
    for run in runs if isinstance(runs, list) else ():
        drop_former_fields(TrainedRun, run)
    return from_dict(TrainingHistory, stored, f"{folder / 'config.json'}: {NATIVE_MODEL_TYPE}.{FIELD}")


def _history_of(manifest: Manifest) -> TrainingHistory:
    """Return what a manifest says about its own run. Files and folders of this machine are left out."""
    start, train = manifest.init_from, manifest.train
    names = [start.vision_tower, start.connector, start.run]
    names = [start.language_model, *(name for name in names if name.startswith("hf:"))]
    found = (_HUB_NAME.fullmatch(name) for name in names if not Path(name).exists())
    run = TrainedRun(
        stage=manifest.stage,
        entries=len(manifest.data.entries),
        epochs=train.epochs,
        global_batch=manifest.batching.global_batch,
        max_tokens=manifest.text.max_tokens,
        vision_tower=train.vision_tower,
        connector=train.connector,
        language_model=train.language_model,
    )
    return TrainingHistory(base_models=(*dict.fromkeys(match[1] for match in found if match),), runs=(run,))
