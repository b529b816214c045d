"""Checks before anything is allocated: weights of another model."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.config.training import EvaluateConfig, LoraConfig, PartConfig
from framestream.trainer.distributed.launchers import LaunchError
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.training import preflight
from framestream.trainer.training.preflight import WEIGHT_NEUTRAL_FIELDS, check_weights
from framestream.trainer.weights.hf_config import ReleaseConfig, build_hf_config
from framestream.trainer.weights.load import save_weights
from tests.helpers.model.rows import SMALL
from tests.helpers.model.weights import initialised, start


def qwen2(folder: Path, **other: object) -> Path:
    """A folder as transformers writes it, with ``other`` settings than the small model's."""
    fields = dataclasses.asdict(SMALL.language_model) | other
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    Qwen2ForCausalLM(Qwen2Config(**fields, rope_parameters=rope)).save_pretrained(folder)
    return folder


def run_of(folder: Path, manifest: Manifest) -> Path:
    """A finished run with random weights."""
    save_weights(initialised(manifest), folder / "final", manifest)
    return folder


def test_added_rows_are_logged_and_missing_ids_refused(tmp_path, caplog) -> None:
    smaller = qwen2(tmp_path / "qwen2", vocab_size=SMALL.language_model.vocab_size - 24)
    assert check_weights(start(language_model=smaller)) == []
    size = f"{SMALL.language_model.vocab_size - 24:,}"
    line = f"init_from.language_model: model.language_model.vocab_size: 24 rows are added to the embedding's {size}"
    assert f"{line}; each is their mean" in caplog.text
    larger = qwen2(tmp_path / "larger", vocab_size=SMALL.language_model.vocab_size + 8)
    assert "wrong shape" in check_weights(start(language_model=larger))[0]


def test_matching_weights_are_accepted(tmp_path: Path) -> None:
    assert check_weights(start()) == []
    assert check_weights(start(language_model=qwen2(tmp_path / "qwen2"))) == []
    run = run_of(tmp_path / "run", start())
    assert check_weights(dataclasses.replace(start(), init_from=InitFromConfig(run=str(run)))) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, model.language_model.rope_theta is"),
        ({"num_attention_heads": 2, "num_key_value_heads": 1}, "num_attention_heads is 2, model.language_model."),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05, model.language_model.rms_norm_eps is 1e-06"),
    ],
)
def test_differences_that_shapes_do_not_show_are_refused(tmp_path: Path, other: dict, message: str) -> None:
    """Key and value heads half as many and twice as wide have the same shapes."""
    faults = check_weights(start(language_model=qwen2(tmp_path / "qwen2", **other)))
    assert faults and all("\n" not in fault for fault in faults)
    assert any(message in fault and str(tmp_path / "qwen2" / "config.json") in fault for fault in faults)


def test_adapters_that_fit_nothing_are_refused(monkeypatch) -> None:
    """A target without a layer, a rank above a layer's, random weights in 4 bits, no peft, and no bitsandbytes."""

    def with_lora(**lora: object) -> Manifest:
        part = PartConfig(train=True, lr=1e-3, lora=LoraConfig(**{"r": 4, **lora}))
        return dataclasses.replace(start(), train=dataclasses.replace(start().train, language_model=part, zero_stage=2))

    assert check_weights(with_lora()) == []
    (fault,) = check_weights(with_lora(targets=("query",)))
    assert fault.startswith("train.language_model.lora.targets: 'query' names no linear layer of the language_model;")
    (fault,) = check_weights(with_lora(r=17))
    fix = "set at most 16, or leave it out of targets"
    layer = "model.layers.0.self_attn.k_proj, 32 inputs and 16 outputs"
    assert fault == f"train.language_model.lora.r: 17 is above the rank of {layer}; {fix}"
    assert check_weights(with_lora(r=17, targets=("q_proj",))) == check_weights(with_lora(r=16)) == []
    (fault,) = check_weights(with_lora(load="4bit"))
    fix = "name weights in init_from.language_model, or set it to full"
    assert fault == f"train.language_model.lora.load: 4bit is for stored weights, not random ones; {fix}"
    known = importlib.util.find_spec
    hidden = ("bitsandbytes", "peft")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else known(name, *rest))
    (fault,) = check_weights(with_lora())
    assert fault == "train.language_model.lora: needs the package peft: pip install -e '.[lora]'"
    context = DistributedContext(0, 1, torch.device("cpu"))
    (fault,) = preflight._check_device(with_lora(load="8bit"), context)
    assert fault.startswith("train.language_model.lora.load: 8bit needs the package bitsandbytes: pip install ")


#: settings in the config.json of other models that this model does not have
OTHERS: list[tuple[str, object]] = [
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    ("rope_scaling", {"rope_type": "linear", "factor": 2.0}),
    ("rope_scaling", {"type": "mrope", "mrope_section": [16, 24, 24]}),
    ("rope_scaling", "linear"),
    ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1000000.0}),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 10.0}),
    ("rope_parameters", [1]),
    ("layer_types", ["sliding_attention", "full_attention"]),
    ("hidden_act", "gelu"),
    ("attention_bias", False),
    ("attention_dropout", 0.1),
    ("head_dim", 32),
    ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("logit_scale", 0.0625),
    ("final_logit_softcapping", 30.0),
    ("num_experts", 60),
    ("model_type", "qwen3"),
    ("model_type", 7),
]


@pytest.mark.parametrize(("field", "value"), OTHERS, ids=[f"{field}-{n}" for n, (field, _) in enumerate(OTHERS)])
def test_settings_that_are_not_computed_here_are_refused_by_name(tmp_path: Path, field: str, value: object) -> None:
    path = qwen2(tmp_path / "qwen2") / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters", {"rope_theta": config.get("rope_theta")})
    path.write_text(json.dumps(config | {"layer_types": None, "rope_theta": rope["rope_theta"], field: value}))
    (fault,) = check_weights(start(language_model=tmp_path / "qwen2"))
    assert fault.startswith(f"init_from.language_model: {path}: ") and f"{field} is " in fault and "\n" not in fault


@pytest.mark.parametrize(("first", "refused"), [(0, True), (1, True), (2, False)])
def test_windows_are_refused_where_a_layer_has_one(tmp_path: Path, first: int, refused: bool) -> None:
    path = qwen2(tmp_path / "qwen2") / "config.json"
    windows = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": first, "layer_types": None}
    path.write_text(json.dumps(json.loads(path.read_text()) | windows))
    faults = check_weights(start(language_model=tmp_path / "qwen2"))
    assert bool(faults) is refused and all("use_sliding_window is True" in fault for fault in faults)


def test_settings_that_change_nothing_are_accepted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Fields of Qwen2.5-7B-Instruct-1M and of fine-tuned copies; a field that nobody here knows is named."""
    path = qwen2(tmp_path / "qwen2") / "config.json"
    fields = {
        "sliding_window": 32768,
        "use_sliding_window": False,
        "max_window_layers": 1,
        "layer_types": None,
        "dual_chunk_attention_config": {"chunk_size": 262144},
        "rope_scaling": None,
        "quantization_config": None,
        "attention_dropout": 0.0,
        "head_dim": None,
        "unsloth_version": "2025.1",
        "partial_rotary_factor": 1.0,
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    assert check_weights(start(language_model=tmp_path / "qwen2")) == [] and not caplog.records
    path.write_text(json.dumps(json.loads(path.read_text()) | {"my_gate": 0.3}))
    assert check_weights(start(language_model=tmp_path / "qwen2")) == []
    assert f"{path}: fields that are not known here and not used: my_gate" in caplog.text


def test_another_tower_of_a_run_or_a_release_is_refused(tmp_path: Path) -> None:
    tower = dataclasses.replace(SMALL.vision_tower, heads=SMALL.vision_tower.heads // 2)
    other = dataclasses.replace(SMALL, vision_tower=tower)
    run = run_of(tmp_path / "run", start(other))
    resumed = dataclasses.replace(start(), init_from=InitFromConfig(run=str(run)))
    (fault,) = check_weights(resumed)
    given = f"heads is {tower.heads}, model.vision_tower.heads is {SMALL.vision_tower.heads}"
    assert fault.startswith("init_from.run: ") and given in fault
    released = run / "final"
    made = start(other)
    settings = ReleaseConfig(other, made.frames, made.images, made.text, "float32")
    (released / "config.json").write_text(json.dumps(build_hf_config(settings, {})))
    (fault,) = check_weights(dataclasses.replace(start(), init_from=InitFromConfig(run=str(released))))
    assert given in fault


def test_the_frame_size_and_groups_may_change(tmp_path: Path) -> None:
    """The switch of stage 4: frames of another size, and groups of other lengths."""
    run = run_of(tmp_path / "run", start())
    tower = dataclasses.replace(SMALL.vision_tower, group_tokens=SMALL.vision_tower.group_tokens + 1)
    larger = start(dataclasses.replace(SMALL, vision_tower=tower))
    frames = dataclasses.replace(larger.frames, size=larger.frames.size * 2)
    assert check_weights(dataclasses.replace(larger, frames=frames, init_from=InitFromConfig(run=str(run)))) == []


def test_missing_paths_and_unfinished_runs_are_one_line(tmp_path: Path) -> None:
    (fault,) = check_weights(start(language_model=tmp_path / "nothing" / "here"))
    assert fault == f"init_from.language_model: {tmp_path}/nothing/here: no such file or folder"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step-000001")
    (fault,) = check_weights(dataclasses.replace(start(), init_from=InitFromConfig(run=str(tmp_path / "run"))))
    assert "has checkpoints and no final weights; finish that stage first" in fault


def test_fields_that_may_differ_are_fields() -> None:
    named = to_dict(SMALL.vision_tower).keys() | to_dict(SMALL.language_model).keys()
    assert named >= WEIGHT_NEUTRAL_FIELDS


def test_ranks_with_other_shards_are_named(monkeypatch) -> None:
    """Rank 1 of two has opened an index of other contents."""
    context = DistributedContext(1, 2, torch.device("cpu"))
    first, own = {"index": "a" * 8, "seed": 0}, {"index": "b" * 8, "seed": 0}
    monkeypatch.setattr(preflight, "broadcast_object", lambda value, context: first)
    monkeypatch.setattr(preflight, "gather_objects", lambda value, context: [[], value])
    preflight.compare_shards(dict(first), context)
    with pytest.raises(LaunchError, match="^rank 1: shards: index .*start every rank with the same") as caught:
        preflight.compare_shards(own, context)
    assert caught.value.everywhere and "seed" not in str(caught.value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [("evaluate", "every", 5), ("evaluate", "questions", 3), ("evaluate", "patience", 2), ("train", "save_every", 7)],
)
def test_ranks_that_would_make_other_calls_are_named(section: str, field: str, value: int) -> None:
    """These fields may change when a run is resumed, but ranks that differ in them would wait for each other."""
    settings = dataclasses.replace(start(), evaluate=EvaluateConfig(every=2))
    changed = dataclasses.replace(getattr(settings, section), **{field: value})
    other = dataclasses.replace(settings, **{section: changed})
    (fault,) = preflight._differences(preflight._shared_values(settings), preflight._shared_values(other))
    assert fault.startswith(f"{section}.{field} (rank 0: ") and fault.endswith(
        f"here: {value}); start every rank with the same"
    )


def test_ranks_with_other_code_are_named(monkeypatch) -> None:
    values, settings = preflight._shared_values(start()), start()
    other = dataclasses.replace(settings, train=dataclasses.replace(settings.train, gradient_checkpointing="tower"))
    (fault,) = preflight._differences(values, preflight._shared_values(other))
    assert fault.startswith("train.gradient_checkpointing ")
    assert list(preflight._differences(values, values)) == []
    monkeypatch.setattr(preflight, "CODE", ("pipeline",))
    (fault,) = preflight._differences(values, preflight._shared_values(start()))
    assert fault.startswith("code ") and fault.endswith("start every rank with the same")
