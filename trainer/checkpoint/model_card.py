"""The model card of an export: ``README.md`` with what the hub reads, the recipe, and how to load the weights."""

from __future__ import annotations

from collections.abc import Sequence

from framestream.pipeline.config.training import PartConfig
from framestream.pipeline.utils.yaml_parser import dump_yaml
from framestream.trainer.checkpoint.training_history import TrainedRun, TrainingHistory
from framestream.trainer.model.parts import PARTS
from framestream.trainer.standalone.export_files import REQUIREMENTS
from framestream.trainer.weights.hf_config import ReleaseConfig

MODEL_CARD_FILE = "README.md"
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
_SELF_CONTAINED = f"""\
## How to use it

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("OWNER/NAME", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("OWNER/NAME", trust_remote_code=True)
content = [{{"type": "video", "video": "film.mp4"}}, {{"type": "text", "text": "What happens?"}}]
chat = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=True)
answer = model.generate(**inputs.to(model.device), max_new_tokens=64)[:, inputs["input_ids"].shape[1] :]
print(processor.batch_decode(answer, skip_special_tokens=True)[0])
```

It needs `pip install {" ".join(f"'{name}'" for name in REQUIREMENTS)}` and nothing else. The Python files here are part
of framestream, and under the Apache License 2.0. Tensors have the names of the published VideoChat-Flash checkpoints.
"""


def render_model_card(settings: ReleaseConfig, history: TrainingHistory, self_contained: bool = False) -> str:
    """Return the card of exported weights. It has no license, which the user states, and no local path.

    Args:
        settings: of the weights.
        history: of their training; empty if it is not known.
        self_contained: the export has code with which transformers loads it.
    """
    base, runs = list(history.base_models), history.runs
    front = {"pipeline_tag": "video-text-to-text", "tags": ["framestream", "video"]}
    if base:
        front = {"base_model": base, **front}
    parts = [f"---\n{dump_yaml(front)}---\n\n# A video language model of framestream\n"]
    license_hint = "State `license:` in the front matter above: it follows from the base\nmodels and from the data."
    parts.append(f"{_describe_source(runs)} {license_hint}\n")
    if base:
        parts.append("It was initialized from " + ", ".join(f"`{name}`" for name in base) + ".\n")
    parts.append(_table("Model", _describe_model(settings)))
    for number, run in enumerate(runs):
        place = f"run {len(runs) - number} of {len(runs)}, " if len(runs) > 1 else ""
        parts.append(_table(f"Training: {place}stage {run.stage}", _describe_run(run)))
    return "\n".join([*parts, _SELF_CONTAINED if self_contained else _LOADING])


def _describe_source(runs: Sequence[TrainedRun]) -> str:
    if runs:
        return f"These are the weights of stage {runs[0].stage}."
    card = "The card of the folder that they were exported from may do so."
    return f"These weights came without the manifest of their training, so this card does not describe it. {card}"


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


def _describe_run(run: TrainedRun) -> dict[str, object]:
    return {
        "entries": run.entries,
        "epochs": run.epochs,
        "global batch": run.global_batch,
        "tokens of a row": run.max_tokens,
        **{part: _describe_part(getattr(run, part)) for part in PARTS},
    }


def _describe_part(config: PartConfig) -> str:
    rate = f"learning rate {config.lr:g}"
    if config.lora:
        return f"LoRA adapters of rank {config.lora.r}, alpha {config.lora.alpha:g}, merged; {rate}"
    return rate if config.train else "frozen"


def _table(heading: str, rows: dict[str, object]) -> str:
    lines = [f"| {name.replace('_', ' ')} | {value} |" for name, value in rows.items()]
    return "\n".join([f"## {heading}\n", "| setting | value |", "| --- | --- |", *lines, ""])
