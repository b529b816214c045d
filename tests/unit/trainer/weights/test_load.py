"""Weights in and out: published layouts, damaged files, random starts, round trips."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.model import InitFromConfig, ModelConfig
from framestream.pipeline.utils.records import read_record, write_record
from framestream.trainer.weights.load import load_pretrained, random_tensor, save_weights
from framestream.trainer.weights.tensor_files import INDEX, WeightsError, from_hf_name, to_hf_name
from tests.helpers.golden_data import files
from tests.helpers.model.manifests import FROZEN
from tests.helpers.model.rows import INTERNVIDEO2, SMALL, dialogue, pack, small_model
from tests.helpers.model.weights import initialised, start

TOWER = "model.vision_tower.vision_tower."
ENCODER = TOWER + "encoder."


def published(model, tower: str = "umt") -> dict[str, torch.Tensor]:
    return {to_hf_name(name, tower): p.detach().clone() for name, p in model.named_parameters()}


def assert_equal(model, expected: dict[str, torch.Tensor], tower: str = "umt") -> None:
    for name, parameter in model.named_parameters():
        if to_hf_name(name, tower) in expected:
            assert torch.equal(parameter, expected[to_hf_name(name, tower)]), name


def test_names_map_both_ways():
    names = [name for name, _ in small_model().named_parameters()]
    assert [from_hf_name(to_hf_name(name)) for name in names] == names
    assert to_hf_name("vision_tower.blocks.0.attn.q_bias") == ENCODER + "blocks.0.attn.q_bias"
    assert to_hf_name("connector.mlp.2.bias") == "model.mm_projector.mlp.2.bias"
    assert to_hf_name("language_model.lm_head.weight") == "lm_head.weight"
    assert from_hf_name("transformer.wte.weight") is None


def test_names_of_internvideo2_map_both_ways():
    names = [name for name, _ in small_model(cfg=INTERNVIDEO2).named_parameters()]
    assert [from_hf_name(to_hf_name(name, "internvideo2"), "internvideo2") for name in names] == names
    assert to_hf_name("vision_tower.cls_token", "internvideo2") == "model.vision_tower.vision_tower.cls_token"


@pytest.mark.parametrize("path", files("internvideo2_vit/*.safetensors"), ids=lambda path: path.stem)
def test_golden_names_of_internvideo2_are_ours(path):
    theirs = set(load_file(path))
    blocks = {name.split(".")[1] for name in theirs if name.startswith("blocks.")}
    names = list(small_model(cfg=INTERNVIDEO2).vision_tower.state_dict())
    each = {name.removeprefix("blocks.0.") for name in names if name.startswith("blocks.0.")}
    ours = {name for name in names if not name.startswith("blocks.")}
    assert theirs == ours | {f"blocks.{block}.{name}" for block in blocks for name in each}


@pytest.mark.parametrize("path", files("multimodal_sequence/weights.safetensors"), ids=lambda path: path.parent.name)
def test_golden_names_are_ours(path):
    with safe_open(path, framework="pt") as file:
        assert all(to_hf_name(from_hf_name(key)) == key for key in file.keys())  # noqa: SIM118


def test_random_start_depends_on_seed_and_name_alone():
    first, second = initialised(start()), initialised(start())
    assert_equal(first, published(second))
    other = initialised(dataclasses.replace(start(), seed=4))
    assert not torch.equal(first.connector.mlp[0].weight, other.connector.mlp[0].weight)
    values = dict(first.named_parameters())
    assert torch.equal(
        values["connector.mlp.2.weight"],
        random_tensor("connector.mlp.2.weight", values["connector.mlp.2.weight"].shape, 3),
    )
    assert values["vision_tower.blocks.1.norm2.weight"].eq(1).all()
    assert values["language_model.model.norm.weight"].eq(1).all()
    assert values["vision_tower.blocks.0.attn.v_bias"].eq(0).all() and values["connector.mlp.0.bias"].eq(0).all()
    embedding = values["language_model.model.embed_tokens.weight"]
    scale = embedding.shape[1] ** -0.5
    assert embedding.std().item() == pytest.approx(scale, rel=0.1) and abs(embedding.mean().item()) < 0.1 * scale


def test_a_qwen2_folder_of_transformers_is_read(tmp_path):
    fields = dataclasses.asdict(SMALL.language_model)
    fields.pop("rope_theta")
    theirs = Qwen2ForCausalLM(Qwen2Config(**fields))
    theirs.save_pretrained(tmp_path / "one")
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX).is_file()
    for folder in ("one", "sharded"):
        assert_equal(initialised(start(language_model=tmp_path / folder)), theirs.state_dict())


@pytest.mark.parametrize("wrapper", [None, "module", "model"])
@pytest.mark.parametrize("prefix", ["", "encoder.", "vision_encoder.", "vision_tower.vision_tower.encoder.", ENCODER])
def test_the_encoders_own_file_is_read(tmp_path, wrapper, prefix):
    source = initialised(dataclasses.replace(start(), seed=9)).vision_tower.state_dict()
    values = {prefix + name.replace("vision_layernorm", "norm"): value for name, value in source.items()}
    if prefix == ENCODER:
        values = {prefix + name: value for name, value in source.items()}
    last = SMALL.vision_tower.depth - 1
    values |= {f"{prefix}blocks.{last}.norm1.weight": torch.ones(48), f"{prefix}pos_embed": torch.ones(1, 4, 48)}
    torch.save({wrapper: values} if wrapper else values, tmp_path / "encoder.pt")
    model = initialised(start(vision_tower=tmp_path / "encoder.pt"))
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, source[name]), name


@pytest.mark.parametrize("wrapper", [None, "module"])
@pytest.mark.parametrize("prefix", ["", "vision_encoder.", "vision_tower.vision_tower.", TOWER])
def test_internvideo2s_own_file_is_read(tmp_path, wrapper, prefix):
    source = initialised(dataclasses.replace(start(INTERNVIDEO2), seed=9)).vision_tower.state_dict()
    values = {prefix + name: value for name, value in source.items()}
    last = INTERNVIDEO2.vision_tower.depth - 1
    values |= {prefix + name: torch.ones(48) for name in (f"blocks.{last}.ls1.weight", "clip_projector.norm1_q.weight")}
    torch.save({wrapper: values} if wrapper else values, tmp_path / "InternVideo2-1B_f4_vision.pt")
    model = initialised(start(INTERNVIDEO2, vision_tower=tmp_path / "InternVideo2-1B_f4_vision.pt"))
    for name, value in model.vision_tower.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_learned_positions_of_other_frames_and_sizes_are_fitted(tmp_path):
    """A file for 8 frames of 12 x 12 patches, with positions that are a plane over time, rows and columns."""
    source = initialised(start(INTERNVIDEO2)).vision_tower.state_dict()

    def plane(frames: int, side: int) -> torch.Tensor:
        over_time, over_side = ((torch.arange(n) + 0.5) / n for n in (frames, side))
        values = over_time.view(-1, 1, 1) + 2 * over_side.view(1, -1, 1) + 4 * over_side.view(1, 1, -1)
        return torch.cat([torch.tensor([9.0]), values.flatten()]).view(1, -1, 1).repeat(1, 1, 48)

    source |= {"pos_embed": plane(8, 12), "img_pos_embed": plane(1, 12)}
    torch.save(source, tmp_path / "encoder.pt")
    tower = initialised(start(INTERNVIDEO2, vision_tower=tmp_path / "encoder.pt")).vision_tower
    for fitted, frames in ((tower.pos_embed, 4), (tower.img_pos_embed, 1)):
        expected = plane(frames, 8)
        assert torch.equal(fitted[:, 0], expected[:, 0])
        # bicubic resizing bends a plane a little; neighbours differ by 0.25 in time or in rows, 0.5 in columns
        assert (fitted - expected).abs().max() < 0.1


@pytest.mark.parametrize("shape", [(1, 300, 48), (1, 257, 40), (257, 48)])
def test_positions_that_cannot_be_fitted_are_named(tmp_path, shape):
    source = initialised(start(INTERNVIDEO2)).vision_tower.state_dict()
    torch.save(source | {"pos_embed": torch.zeros(shape)}, tmp_path / "encoder.pt")
    with pytest.raises(WeightsError) as error:
        initialised(start(INTERNVIDEO2, vision_tower=tmp_path / "encoder.pt"))
    wrong = f"wrong shape: vision_tower.pos_embed is {list(shape)}, the model's [1, 257, 48]"
    assert str(error.value).endswith(wrong)


def test_a_random_internvideo2_has_the_published_start_values():
    tower = initialised(start(INTERNVIDEO2)).vision_tower
    block = tower.blocks[1]
    assert torch.equal(block.ls1.weight, torch.full((48,), 1e-5)) and torch.equal(block.ls2.weight, block.ls1.weight)
    assert block.norm1.weight.eq(1).all() and block.attn.q_norm.weight.eq(1).all() and block.mlp.fc1.bias.eq(0).all()
    assert tower.cls_token.abs().max() > 0 and tower.pos_embed[:, 0].eq(0).all()
    time, place = tower.pos_embed[0, 1:].detach().view(4, 64, 48).split([12, 36], dim=-1)
    assert (time == time[:, :1]).all() and (place == place[:1]).all()


@pytest.mark.parametrize(("ours", "theirs"), [(SMALL, INTERNVIDEO2), (INTERNVIDEO2, SMALL)])
def test_a_language_model_is_taken_out_of_a_model_with_another_tower(tmp_path, ours, theirs):
    source = initialised(dataclasses.replace(start(theirs), seed=9))
    save_file(published(source, theirs.vision_tower.type), tmp_path / "model.safetensors")
    model = initialised(start(ours, language_model=tmp_path))
    for name, value in model.language_model.state_dict().items():
        assert torch.equal(value, source.language_model.state_dict()[name]), name
    with pytest.raises(WeightsError, match=r"missing: vision_tower\..*unexpected: vision_tower\."):
        initialised(start(ours, vision_tower=tmp_path))


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector.", ""])
def test_a_stage_1_adapter_file_is_read(tmp_path, prefix):
    source = initialised(dataclasses.replace(start(), seed=9)).connector.state_dict()
    torch.save({prefix + name: value for name, value in source.items()}, tmp_path / "mm_projector.bin")
    for place in (tmp_path, tmp_path / "mm_projector.bin"):
        model = initialised(start(connector=place))
        assert all(torch.equal(value, source[name]) for name, value in model.connector.state_dict().items())


def test_a_stage_1_adapter_wins_over_the_run_beside_it(tmp_path):
    settings = start()
    run, adapter = initialised(settings), initialised(dataclasses.replace(settings, seed=9)).connector.state_dict()
    save_weights(run, tmp_path / "stage1" / "final", settings)
    torch.save({f"model.mm_projector.{name}": value for name, value in adapter.items()}, tmp_path / "mm_projector.bin")
    init = InitFromConfig(run=str(tmp_path / "stage1"), connector=str(tmp_path / "mm_projector.bin"))
    model = initialised(dataclasses.replace(settings, init_from=init, seed=5))
    expected = published(run) | {f"model.mm_projector.{name}": value for name, value in adapter.items()}
    assert_equal(model, expected)


@pytest.mark.parametrize("cfg", [SMALL, INTERNVIDEO2], ids=["umt", "internvideo2"])
def test_faults_of_an_encoder_and_an_adapter_are_listed_together(tmp_path, cfg):
    model = initialised(start(cfg))
    encoder, adapter = model.vision_tower.state_dict(), model.connector.state_dict()
    for values, missing, wrong in (
        (encoder, "blocks.1.mlp.fc2.bias", "patch_embed.proj.weight"),
        (adapter, "mlp.0.bias", "mlp.2.weight"),
    ):
        del values[missing]
        values |= {wrong: torch.ones(2, 3), "blocks.0.odd": torch.ones(1)}
    torch.save(encoder, tmp_path / "encoder.pt")
    torch.save({f"model.mm_projector.{name}": value for name, value in adapter.items()}, tmp_path / "mm_projector.bin")
    places = {"vision_tower": tmp_path / "encoder.pt", "connector": tmp_path / "mm_projector.bin"}
    with pytest.raises(WeightsError) as error:
        initialised(start(cfg, **places))
    text = str(error.value)
    assert "\n" not in text
    for part, missing, wrong in (
        ("vision_tower", "blocks.1.mlp.fc2.bias", "patch_embed.proj.weight"),
        ("connector", "mlp.0.bias", "mlp.2.weight"),
    ):
        assert (
            f"init_from.{part}: {places[part]}: does not fit the manifest's {part}: missing: {part}.{missing};" in text
        )
        assert f"unexpected: {part}.blocks.0.odd; wrong shape: {part}.{wrong} is [2, 3], the model's [" in text


def test_faults_of_a_whole_folder_are_listed_together(tmp_path):
    values = published(initialised(start()))
    del values["lm_head.weight"], values[ENCODER + "blocks.0.norm1.bias"]
    values["model.mm_projector.mlp.4.bias"] = torch.ones(2)
    (tmp_path / "config.json").write_text("{}")
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        initialised(dataclasses.replace(start(), init_from=InitFromConfig(run=str(tmp_path))))
    text = str(error.value)
    names = ("missing: language_model.lm_head", "missing: vision_tower.blocks.0.norm1", "unexpected: connector.mlp.4")
    assert all(name in text for name in names) and text.count("init_from.run: ") == 3
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError) as error:
        initialised(dataclasses.replace(start(), init_from=InitFromConfig(run=str(tmp_path))))
    assert str(error.value).count("init_from.run: ") == 1  # a damaged file is one fault


def test_missing_unexpected_and_misshapen_tensors_are_listed_by_name(tmp_path):
    values = published(initialised(start()))
    del values["model.layers.1.mlp.up_proj.weight"]
    values["model.norm.weight"] = torch.ones(7)
    values["model.layers.0.self_attn.rotary.weight"] = torch.ones(3)
    save_file(values, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        initialised(start(language_model=tmp_path))
    text = str(error.value)
    assert "\n" not in text and str(tmp_path) in text and text.startswith("init_from.language_model")
    assert "missing: language_model.model.layers.1.mlp.up_proj.weight" in text
    assert "unexpected: language_model.model.layers.0.self_attn.rotary.weight" in text
    assert "wrong shape: language_model.model.norm.weight is [7], the model's [32]" in text


def test_a_file_of_another_model_is_refused(tmp_path):
    save_file({"transformer.h.0.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"unexpected: transformer\.h\.0\.weight"):
        initialised(start(language_model=tmp_path))


@pytest.mark.parametrize("part", ["vision_tower", "connector", "language_model"])
def test_a_part_is_taken_out_of_a_whole_model(tmp_path, part):
    source = published(initialised(dataclasses.replace(start(), seed=9)))
    save_file(source, tmp_path / "model.safetensors")
    model, fresh = initialised(start(**{part: tmp_path})), initialised(start())
    for name, parameter in model.named_parameters():
        expected = source[to_hf_name(name)] if name.startswith(part) else dict(fresh.named_parameters())[name]
        assert torch.equal(parameter, expected), name


def bad_truncated(path):
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])


def bad_pickle(path):
    class Trap:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"model.norm.weight": Trap()}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("model.safetensors", bad_truncated),
        ("model.safetensors", lambda path: path.write_bytes(b"<html>not here</html>")),
        ("model.bin", lambda path: path.write_bytes(b"")),
        ("model.bin", lambda path: path.write_bytes(b"<html>not here</html>")),
        ("model.bin", bad_pickle),
        ("model.bin", lambda path: torch.save([torch.ones(2)], path)),
    ],
    ids=["truncated", "html", "empty", "html_torch", "code", "list"],
)
def test_damaged_and_hostile_files_are_one_clear_error(tmp_path, capfd, name, write):
    write(tmp_path / name)
    with pytest.raises(WeightsError) as error:
        initialised(start(language_model=tmp_path / name))
    assert "\n" not in str(error.value) and str(tmp_path / name) in str(error.value)
    assert "executed" not in capfd.readouterr().out


def test_absent_places_are_named(tmp_path):
    with pytest.raises(WeightsError, match="no such file or folder"):
        initialised(start(vision_tower=tmp_path / "encoder.pt"))
    with pytest.raises(WeightsError, match="no weights here"):
        initialised(start(language_model=tmp_path))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    with pytest.raises(WeightsError, match="names files that are missing: model-00001"):
        initialised(start(language_model=tmp_path))
    run = dataclasses.replace(start(), init_from=InitFromConfig(run=str(tmp_path / "stage1")))
    with pytest.raises(WeightsError, match=r"init_from\.run: .*stage1: no such folder, nor a stage"):
        initialised(run)


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied"])
@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one_file", "shards"])
def test_saved_weights_are_read_back_bit_for_bit(tmp_path, limit, tied):
    language = dataclasses.replace(SMALL.language_model, tie_word_embeddings=tied)
    cfg = ModelConfig(vision_tower=SMALL.vision_tower, language_model=language)
    settings = dataclasses.replace(start(), model=cfg)
    model = initialised(settings).to(torch.bfloat16)
    save_weights(model, tmp_path / "stage1" / "final", settings, limit)
    written = sorted((tmp_path / "stage1/final").glob("*.safetensors"))
    read = {key: value for file in written for key, value in load_file(file).items()}
    expected = published(model)
    assert set(read) == set(expected) and ("lm_head.weight" in read) is not tied
    assert all(torch.equal(read[key], value) for key, value in expected.items())
    if limit < 10**9:
        index = json.loads((tmp_path / "stage1/final" / INDEX).read_text())
        assert set(index["weight_map"].values()) == {file.name for file in written} and len(written) > 2
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in expected.values())
        assert all(file.stat().st_size < limit + 4096 or len(load_file(file)) == 1 for file in written)
    again = load_pretrained(tmp_path / "stage1/final")
    assert not again.training and {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert_equal(again, expected)
    follow = dataclasses.replace(settings, init_from=InitFromConfig(run=str(tmp_path / "stage1")))
    assert_equal(initialised(follow).to(torch.bfloat16), expected)
    batch = pack([dialogue(0, clips=1), dialogue(1)])
    with torch.no_grad():
        assert model(batch).item() == again(batch).item()


def test_internvideo2_keeps_published_names_at_another_size(tmp_path):
    settings = start(INTERNVIDEO2)
    model = initialised(settings)
    save_weights(model, tmp_path / "stage3" / "final", settings)
    written = load_file(tmp_path / "stage3" / "final" / "model.safetensors")
    assert {name for name in written if name.startswith(TOWER)} == {
        TOWER + name for name in model.vision_tower.state_dict()
    }
    assert_equal(load_pretrained(tmp_path / "stage3" / "final"), written, "internvideo2")
    following = dataclasses.replace(settings, init_from=InitFromConfig(run=str(tmp_path / "stage3")))
    assert_equal(initialised(following), written, "internvideo2")
    larger = dataclasses.replace(following, frames=dataclasses.replace(following.frames, size=192))
    tower = initialised(larger).vision_tower
    assert tower.pos_embed.shape == (1, 1 + 4 * 144, 48) and tower.img_pos_embed.shape == (1, 145, 48)
    assert torch.equal(tower.blocks[0].attn.qkv.weight, model.vision_tower.blocks[0].attn.qkv.weight)


def test_tokens_beyond_the_stored_rows_start_at_the_mean(tmp_path):
    language = SMALL.language_model
    fields = dataclasses.asdict(language) | {"vocab_size": language.vocab_size - 5}
    fields.pop("rope_theta")
    theirs = Qwen2ForCausalLM(Qwen2Config(**fields))
    theirs.save_pretrained(tmp_path / "qwen2")
    settings = start(language_model=tmp_path / "qwen2")
    model = initialised(settings)
    for ours, stored in (
        (model.language_model.model.embed_tokens, theirs.model.embed_tokens),
        (model.language_model.lm_head, theirs.lm_head),
    ):
        assert torch.equal(ours.weight[:-5], stored.weight)
        torch.testing.assert_close(ours.weight[-5:], stored.weight.mean(0).expand(5, -1))
    save_weights(model, tmp_path / "run" / "final", settings)  # from here on all rows are stored
    assert_equal(load_pretrained(tmp_path / "run" / "final"), published(model))
    path = tmp_path / "run" / "final" / "config.json"
    record = read_record(path, "config", "")
    record["model"]["language_model"]["vocab_size"] += 8
    write_record(path, record)
    with pytest.raises(WeightsError, match="wrong shape: language_model.model.embed_tokens.weight"):
        load_pretrained(tmp_path / "run" / "final")


def test_an_absent_head_is_explained(tmp_path):
    fields = dataclasses.asdict(SMALL.language_model) | {"tie_word_embeddings": True}
    fields.pop("rope_theta")
    Qwen2ForCausalLM(Qwen2Config(**fields)).save_pretrained(tmp_path)
    with pytest.raises(
        WeightsError, match=r"missing: .*lm_head.weight; .*set model.language_model.tie_word_embeddings"
    ):
        initialised(start(language_model=tmp_path))


def test_damage_of_final_weights_is_found(tmp_path):
    settings = start()
    save_weights(initialised(settings), tmp_path / "stage1" / "final", settings, 20_000)
    final = tmp_path / "stage1" / "final"
    follow = dataclasses.replace(settings, init_from=InitFromConfig(run=str(tmp_path / "stage1")))
    for name in ("config.json", sorted(path.name for path in final.glob("*.safetensors"))[1]):
        data = (final / name).read_bytes()
        at = data.rindex(b"2") if name == "config.json" else len(data) - 7
        (final / name).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        for read in (lambda: load_pretrained(final), lambda: initialised(follow)):
            with pytest.raises(WeightsError, match=f"{name}: damaged .*digest differs.*; copy it again"):
                read()
        (final / name).write_bytes(data)
    load_pretrained(final)


def test_load_pretrained_refuses_other_folders(tmp_path):
    with pytest.raises(WeightsError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(WeightsError, match="model_type is 'qwen2'"):
        load_pretrained(tmp_path)


def test_frozen_parts_are_saved_too(tmp_path):
    settings = start()
    model = initialised(settings)
    model.language_model.requires_grad_(FROZEN.train)
    save_weights(model, tmp_path, settings)
    assert set(load_file(tmp_path / "model.safetensors")) == set(published(model))


def test_weights_of_another_size_are_used_with_tables_of_the_new_one(tmp_path):
    """A tower trained at 128 px goes on at 192 px: positions are computed, not stored."""
    settings = start()
    save_weights(initialised(settings), tmp_path / "stage3" / "final", settings)
    larger = dataclasses.replace(
        settings,
        frames=dataclasses.replace(settings.frames, size=192),
        init_from=InitFromConfig(run=str(tmp_path / "stage3")),
    )
    model = initialised(larger)
    assert model.vision_tower.tile_positions.shape[0] == 144
    np.testing.assert_array_equal(
        model.vision_tower.blocks[0].attn.qkv.weight.detach(),
        initialised(settings).vision_tower.blocks[0].attn.qkv.weight.detach(),
    )
