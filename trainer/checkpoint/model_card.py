"""The model card of an export: ``README.md`` with what the hub reads, the recipe, and how to load the weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from framestream.pipeline.config.manifest import Manifest, ManifestError, load_manifest
from framestream.pipeline.utils.yaml_parser import dump_yaml
from framestream.trainer.model.parts import PARTS
from framestream.trainer.weights.hf_config import ReleaseConfig
from framestream.trainer.weights.runs import locate_paths

logger = logging.getLogger(__name__)

MODEL_CARD_FILE = "README.md"
MAX_STAGES = 16  #: runs that are followed from one to the one before
_HUB_NAME = re.compile(r"(?:hf:)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@[^:/\s]+)?(?::[^\s]+)?", re.ASCII)
_LOADING = """\
## How to load it

```python
from huggingface_hub import snapshot_download
from framestream.trainer.weights.load import load_pretrained

model = load_pretrained(snapshot_download("OWNER/NAME"))
```

`python -m trainer.chat --checkpoint FOLDER --manifest STAGE.yaml --video FILE --question TEXT` asks it about a video.
The manifest is that of the stage. The layout is that of the published VideoChat-Flash checkpoints.
"""


def render_model_card(settings: ReleaseConfig, manifests: Sequence[Manifest]) -> str:
    """Return the card of exported weights. It has no license, which the user states, and no local path.

    Args:
        settings: of the weights.
        manifests: of the run and of the runs before it, the newest first; none if they are not known.
    """
    names = [name for manifest in manifests for name in _base_names(manifest)]
    base = list(dict.fromkeys(names))
    front = {"pipeline_tag": "video-text-to-text", "tags": ["framestream", "video"]}
    if base:
        front = {"base_model": base, **front}
    stage = f"stage {manifests[0].stage}" if manifests else "a stage that is not known"
    parts = [f"---\n{dump_yaml(front)}---\n\n# A video language model of framestream\n"]
    license_hint = "State `license:` in the front matter above: it follows from the base\nmodels and from the data."
    parts.append(f"These are the weights of {stage}. {license_hint}\n")
    if base:
        parts.append("It was initialized from " + ", ".join(f"`{name}`" for name in base) + ".\n")
    parts.append(_table("Model", _describe_model(settings)))
    parts += [_table(f"Training of stage {manifest.stage}", _describe_training(manifest)) for manifest in manifests]
    return "\n".join([*parts, _LOADING])


def find_manifests(checkpoint: Path) -> list[Manifest]:
    """Return the manifests of a run and of the runs that it continues, as far as they are there, the newest first."""
    found: list[Manifest] = []
    folders = [checkpoint, checkpoint.parent, checkpoint.parent.parent]
    path = next((folder / "manifest.yaml" for folder in folders if (folder / "manifest.yaml").is_file()), None)
    while path is not None and path.is_file() and len(found) < MAX_STAGES:
        try:
            found.append(locate_paths(load_manifest(path, stored=True), path))
        except ManifestError as error:
            logger.warning("%s; the model card does not describe this run", error)
            break
        run = found[-1].init_from.run
        path = Path(run) / "manifest.yaml" if run and ":" not in run else None
    return found


def _base_names(manifest: Manifest) -> list[str]:
    """Return the hub names of initial weights. Files and folders of this machine are left out."""
    start = manifest.init_from
    names = [start.vision_tower, start.connector, start.run]
    names = [start.language_model, *(name for name in names if name.startswith("hf:"))]
    found = [_HUB_NAME.fullmatch(name) for name in names if not Path(name).exists()]
    return [match[1] for match in found if match]


def _describe_model(settings: ReleaseConfig) -> dict[str, object]:
    model, tower, frames = settings.model, settings.model.vision_tower, settings.frames
    return {
        "vision tower": f"{tower.type}, width {tower.width}, depth {tower.depth}",
        "language model": (
            f"Qwen2, width {model.language_model.hidden_size}, {model.language_model.num_hidden_layers} layers"
        ),
        "dtype": settings.dtype,
        "frames": f"{frames.min} to {frames.max} by `{frames.sampler}`, {frames.size} pixels",
    }


def _describe_training(manifest: Manifest) -> dict[str, object]:
    trained = {part: getattr(manifest.train, part) for part in PARTS}
    return {
        "entries": len(manifest.data.entries),
        "epochs": manifest.train.epochs,
        "global batch": manifest.batching.global_batch,
        "tokens of a row": manifest.text.max_tokens,
        **{part: f"learning rate {value.lr:g}" if value.train else "frozen" for part, value in trained.items()},
    }


def _table(heading: str, rows: dict[str, object]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {heading}\n", "| setting | value |", "| --- | --- |", *lines, ""])
