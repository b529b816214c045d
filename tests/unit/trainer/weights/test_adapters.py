"""Adapters in files: peft reads ours, merges are peft's to the bit, and damaged or foreign files are refused."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.pipeline.utils.records import write_record
from framestream.trainer.model.lora import add_adapters, is_adapter
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.weights import load
from framestream.trainer.weights.load import load_pretrained, save_weights
from framestream.trainer.weights.tensor_files import WeightsError
from framestream.trainer.weights.tensor_reader import weights_digest
from tests.helpers.model.manifests import FROZEN
from tests.helpers.model.rows import dialogue, pack
from tests.helpers.model.weights import initialised, start


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def run(request, tmp_path_factory):
    """A run with adapters of the language model on the weights of another run: its folder, its model, its manifest."""
    folder = tmp_path_factory.mktemp(request.param)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[request.param]
    settings = start()
    save_weights(initialised(settings).to(dtype), folder / "base", settings)
    lora = PartConfig(train=True, lr=1e-3, lora=LoraConfig(r=4, alpha=8.0, targets=("q_proj", "down_proj")))
    train = dataclasses.replace(settings.train, language_model=lora, vision_tower=FROZEN, dtype=request.param)
    base = str(folder / "base")
    settings = dataclasses.replace(start(vision_tower=base, connector=base, language_model=base), train=train)
    model = initialised(settings).to(dtype)
    add_adapters(model, settings)
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if is_adapter(name):
            p.data = (torch.randn(p.shape, generator=generator) * 0.3).to(dtype)
    save_weights(model, folder / "final", settings)
    return folder, model, settings


def test_final_weights_are_adapters_and_what_is_trained_in_full(run):
    folder, _, _ = run
    found = sorted(str(path.relative_to(folder / "final")) for path in (folder / "final").rglob("*") if path.is_file())
    adapters = [f"adapters/language_model/adapter_{name}" for name in ("config.json", "model.safetensors")]
    assert found == [*adapters, "config.json", "model.safetensors"]
    config = json.loads((folder / "final" / "config.json").read_text())
    assert sorted(config["base"]) == ["language_model", "vision_tower"]


def test_loading_merges_as_peft_does(run):
    folder, model, _ = run
    loaded = load_pretrained(folder / "final")
    plain = load_pretrained(folder / "base").language_model
    theirs = peft.PeftModel.from_pretrained(plain, folder / "final" / "adapters" / "language_model").merge_and_unload()
    expected = dict(theirs.named_parameters())
    changed = 0
    for name, p in loaded.language_model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=0)
        changed += not torch.equal(p, dict(load_pretrained(folder / "base").language_model.named_parameters())[name])
    assert changed == 4
    batch = pack([dialogue(0, clips=1, text=20)])
    torch.testing.assert_close(loaded(batch), model(batch), rtol=2e-2, atol=1e-3)


def test_a_run_goes_on_from_a_run_with_adapters(run, tmp_path):
    """With new adapters: both are merged, one after the other. Without: the next run has all weights itself."""
    folder, _, settings = run
    final = str(folder / "final")
    plain = start(vision_tower=final, connector=final, language_model=final)
    again = dataclasses.replace(settings, init_from=plain.init_from)
    model = initialised(again).to(next(run[1].parameters()).dtype)
    first = {name: p.clone() for name, p in model.named_parameters()}
    expected = dict(load_pretrained(folder / "final").named_parameters())
    assert all(torch.equal(p, expected[name]) for name, p in first.items())
    add_adapters(model, again)
    name = "model.layers.1.mlp.down_proj"
    layer = model.language_model.get_submodule(name)
    torch.nn.init.ones_(layer.lora_B["default"].weight)
    save_weights(model, tmp_path / "second", again)
    found = dict(load_pretrained(tmp_path / "second").named_parameters())
    assert [key for key, p in found.items() if not torch.equal(p, first[key])] == [f"language_model.{name}.weight"]
    save_weights(initialised(plain), tmp_path / "full", plain)
    assert "base" not in json.loads((tmp_path / "full" / "config.json").read_text())


def copy_without_digests(folder, to):
    """Copy final weights, and let their config.json say nothing about the files beside it."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    write_record(to / "config.json", {k: v for k, v in config.items() if k not in ("digest", "digests")})
    return to


def damage(folder, **fields):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def replace_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
OTHER_LAYER = {"x.lora_A.weight": torch.ones(2, 7), "x.lora_B.weight": torch.ones(3, 2)}
NO_RANK = {"x.lora_A.weight": torch.ones(0, 7), "x.lora_B.weight": torch.ones(3, 0)}
TENSORS = {
    "no A": (lambda tensors: tensors.pop(NAME), "q_proj has no A and B that fit"),
    "other shape": (lambda tensors: tensors.update({NAME: torch.ones(4, 7)}), "adapters of another model"),
    "no rank": (lambda tensors: tensors.update(NO_RANK), "x has no A and B that fit"),
    "integers": (lambda tensors: tensors.update({NAME: torch.ones(4, 32, dtype=torch.int64)}), "no A and B that fit"),
    "other layer": (lambda tensors: tensors.update(OTHER_LAYER), "is not in the model"),
    "embedding": (
        lambda tensors: tensors.update({"x.lora_embedding_A": torch.ones(2, 7)}),
        "is no adapter of a linear",
    ),
}
FAULTS = {
    "another kind": (lambda f: damage(f, peft_type="LOHA"), "not the configuration of LoRA adapters"),
    "dora": (lambda f: damage(f, use_dora=True), "use_dora is set; merge these adapters with peft"),
    "own ranks": (lambda f: damage(f, rank_pattern={"q_proj": 2}), "rank_pattern is set"),
    "alpha": (lambda f: damage(f, lora_alpha="8"), "lora_alpha is '8', not a finite number"),
    "infinite alpha": (lambda f: damage(f, lora_alpha=float("-inf")), "lora_alpha is -inf, not a finite number"),
    "huge alpha": (lambda f: damage(f, lora_alpha=10**400), "not a finite number; copy the adapters again"),
    "cut": (lambda f: (f / "adapter_config.json").write_text('{"peft_type'), "cannot be read"),
    "other file": (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 99), "not a file of tensors"),
    **{name: (functools.partial(replace_tensors, change=change), fault) for name, (change, fault) in TENSORS.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_and_foreign_adapters_are_refused(run, tmp_path, fault):
    copy_without_digests(run[0] / "final", tmp_path / "final")
    change, message = FAULTS[fault]
    change(tmp_path / "final" / "adapters" / "language_model")
    with pytest.raises(WeightsError, match=re.escape(message)) as error:
        load_pretrained(tmp_path / "final")
    assert "\n" not in str(error.value) and "adapters/language_model" in str(error.value)


def test_a_config_of_a_larger_model_takes_no_memory(run, tmp_path, monkeypatch):
    copy_without_digests(run[0] / "final", tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    del config["digest"]
    config["model"]["language_model"]["intermediate_size"] *= 1000
    (tmp_path / "final" / "config.json").write_text(json.dumps(config))

    def build(*shape):
        assert torch.empty(0).is_meta
        return VideoLLM(*shape)

    monkeypatch.setattr(load, "VideoLLM", build)
    with pytest.raises(WeightsError, match="wrong shape"):
        load_pretrained(tmp_path / "final")


def test_changed_files_are_found_by_their_digests(run, tmp_path):
    shutil.copytree(run[0] / "final", tmp_path / "final")
    replace_tensors(tmp_path / "final" / "adapters" / "language_model", lambda t: t[NAME].mul_(2))
    with pytest.raises(WeightsError, match="damaged"):
        load_pretrained(tmp_path / "final")
    shutil.rmtree(tmp_path / "final" / "adapters")  # not taken for a run without adapters
    with pytest.raises(WeightsError, match="adapter_config.json: cannot be read"):
        load_pretrained(tmp_path / "final")


def test_digests_tell_weights_of_one_size_and_name_apart(tmp_path):
    digests = set()
    for seed in (0, 1, 0):
        values = torch.randn(400, 1000, generator=torch.Generator().manual_seed(seed))
        save_file({"weight": values}, tmp_path / "encoder.safetensors")
        digests |= {weights_digest(tmp_path), weights_digest(tmp_path / "encoder.safetensors")}
    assert len(digests) == 2
    with pytest.raises(WeightsError, match="no weights here"):
        weights_digest(tmp_path / "nothing")


def test_other_weights_under_the_address_are_refused(run, tmp_path):
    folder, _, _ = run
    shutil.copytree(folder / "final", tmp_path / "final")
    config = json.loads((tmp_path / "final" / "config.json").read_text())
    shutil.copytree(folder / "base", tmp_path / "base")
    config["base"]["language_model"]["address"] = str(tmp_path / "base")
    write_record(tmp_path / "final" / "config.json", {k: v for k, v in config.items() if k != "digest"})
    load_pretrained(tmp_path / "final")
    other = dataclasses.replace(start(), seed=4)
    save_weights(initialised(other), tmp_path / "base", other)
    with pytest.raises(WeightsError, match="its language_model was trained on other weights"):
        load_pretrained(tmp_path / "final")
    config["base"]["language_model"]["address"] = str(tmp_path / "final")
    write_record(tmp_path / "final" / "config.json", {k: v for k, v in config.items() if k != "digest"})
    with pytest.raises(WeightsError, match="its language_model was trained on other weights"):
        load_pretrained(tmp_path / "final")
