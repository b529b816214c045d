"""Folders of weights as other programs, and damage, leave them."""

from __future__ import annotations

import dataclasses
import json
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.trainer.weights import tensor_reader
from framestream.trainer.weights.tensor_files import INDEX, WeightsError, to_hf_name
from framestream.trainer.weights.tensor_reader import open_tensors
from tests.helpers.model.rows import SMALL
from tests.helpers.model.weights import initialised, start


def published(model) -> dict[str, torch.Tensor]:
    return {to_hf_name(name): p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(model, expected: dict[str, torch.Tensor]) -> None:
    found = published(model)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.fixture
def folder(tmp_path):
    """A folder of transformers' Qwen2, in two shards with an index."""
    fields = dataclasses.asdict(SMALL.language_model)
    fields.pop("rope_theta")
    Qwen2ForCausalLM(Qwen2Config(**fields)).save_pretrained(tmp_path / "two", max_shard_size="60KB")
    return tmp_path / "two"


def test_a_name_in_two_files_without_an_index_is_refused(folder):
    expected = initialised(start(language_model=folder))
    files = sorted(folder.glob("*.safetensors"))
    copy = {name: value + 1 for name, value in load_file(files[0]).items()}
    save_file(copy, folder / "zz_optimizer_state.safetensors")
    assert_equal(initialised(start(language_model=folder)), published(expected))  # the index decides
    (folder / INDEX).unlink()
    with pytest.raises(WeightsError) as caught:
        initialised(start(language_model=folder))
    message = str(caught.value)
    assert f" is in {files[0].name} and in zz_optimizer_state.safetensors; name one of the files, or" in message
    assert message.startswith(f"init_from.language_model: {folder}: ") and "\n" not in message
    (folder / "zz_optimizer_state.safetensors").unlink()
    assert_equal(initialised(start(language_model=folder)), published(expected))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ("[1]", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 1}}', "no name of a file in its folder"),
        ('{"weight_map": {"a": null, "b": "x"}}', "no name of a file in its folder"),
        ('{"weight_map": {"a": "../qwen/model.safetensors"}}', "no name of a file in its folder"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no name of a file in its folder"),
        ('{"weight_map": {"a": ".."}}', "no name of a file in its folder"),
        ('{"weight_map": {"a": "gone\\u001b[2J.safetensors"}}', "names files that are missing: gone?[2J"),
        ('{"weight_map": {"a": "FIRST"}}', "the index says that a is in FIRST, which lacks it"),
    ],
)
def test_damaged_indexes_are_one_line(folder, content, message):
    first = sorted(folder.glob("*.safetensors"))[0].name
    (folder / INDEX).write_text(content.replace("FIRST", first))
    with pytest.raises(WeightsError) as caught:
        initialised(start(language_model=folder))
    assert message.replace("FIRST", first) in str(caught.value) and "\n" not in str(caught.value)


def test_integers_are_no_weights(tmp_path):
    model = initialised(start())
    values = published(model)
    values["model.norm.weight"] = values["model.norm.weight"].to(torch.int32)
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="not floating-point numbers: language_model.model.norm.weight"):
        initialised(start(language_model=tmp_path))


def header(fields: object, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor_at(begin: int, end: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        (2**63).to_bytes(8, "little"),
        (10**9).to_bytes(8, "little") + b"{",
        header(b"{"),
        header([]),
        header(b"[" * 100_000),
        header({"a": tensor_at(0, 400, [100])}, bytes(40)),
        header({"a": tensor_at(8, 4, [1])}, bytes(8)),
        header({"a": tensor_at(-4, 0, [1])}, bytes(8)),
        header({"a": tensor_at(0, 8, [2]), "b": tensor_at(4, 12, [2])}, bytes(12)),
        header({"a": tensor_at(0, 8, [1])}, bytes(8)),
        header({"a": tensor_at(0, 8, [2**40, 2**40])}, bytes(8)),
        header({"a": tensor_at(0, 8, [-2])}, bytes(8)),
        header({"a": tensor_at(0, 8, [2], "X7")}, bytes(8)),
        header({"a": {"dtype": "F32"}}, bytes(8)),
    ],
)
def test_headers_that_lie_are_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a file of tensors that can be read .*; fetch it"):
        open_tensors(tmp_path)


def test_tensors_beyond_the_limit_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_reader, "MAX_TENSORS", 5)
    save_file({f"t{n}": torch.zeros(1) for n in range(7)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="has over 5 tensors"):
        open_tensors(tmp_path)


def test_a_compressed_torch_file_is_not_unpacked(tmp_path):
    torch.save({"a": torch.zeros(1000)}, tmp_path / "sound.pt")
    assert open_tensors(tmp_path / "sound.pt")["a"].shape == (1000,)
    with zipfile.ZipFile(tmp_path / "sound.pt") as sound, zipfile.ZipFile(tmp_path / "bomb.pt", "w", 8) as bomb:
        for member in sound.namelist():
            bomb.writestr(member, bytes(10**7) if "/data/" in member else sound.read(member))
    with pytest.raises(WeightsError, match="bomb.pt: .*it is compressed"):
        open_tensors(tmp_path / "bomb.pt")
