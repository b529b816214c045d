"""Weights out in the release layout, read back by us and by transformers; released folders in; checkpoints of ranks."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from framestream.pipeline.config.manifest import Manifest, ManifestError, load_manifest
from framestream.pipeline.config.model import InitFromConfig, LanguageModelConfig, ModelConfig, VisionTowerConfig
from framestream.pipeline.config.preprocessing import ImagesConfig
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import read_record, write_record
from framestream.trainer.checkpoint.export import ExportError, export
from framestream.trainer.checkpoint.state import write_pointer
from framestream.trainer.export import main
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.weights.hf_config import ReleaseConfig, describe_tower_mismatch, is_hf_release, parse_hf_config
from framestream.trainer.weights.load import initialize, load_pretrained, save_weights
from framestream.trainer.weights.tensor_files import INDEX, WeightsError, to_hf_name
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.golden_data import files
from tests.helpers.model import golden_sequence as golden
from tests.helpers.model import published_tensors as shapes
from tests.helpers.model.manifests import manifest
from tests.helpers.model.published_tensors import Shapes
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack
from tests.helpers.paths import ROOT

TOKENIZER = ROOT / "tests" / "golden" / "tokens_labels" / "tokenizer"
CODE = "modeling_videochat_flash.py"


def settings(tied: bool = False, size: int = SIZE, **fields) -> Manifest:
    """A small model's manifest with random first weights and the golden tokenizer."""
    language = dataclasses.replace(SMALL.language_model, tie_word_embeddings=tied, vocab_size=1024)
    made = manifest(size, ModelConfig(vision_tower=SMALL.vision_tower, language_model=language))
    text = dataclasses.replace(made.text, tokenizer=str(TOKENIZER), max_tokens=8192)
    random = InitFromConfig(vision_tower="random", language_model="random")
    return dataclasses.replace(made, text=text, init_from=random, seed=5, **fields)


def with_tokenizer(folder: Path) -> Manifest:
    made = settings()
    return dataclasses.replace(made, text=dataclasses.replace(made.text, tokenizer=str(folder)))


def finished(folder: Path, made: Manifest, dtype: torch.dtype = torch.bfloat16) -> tuple[Path, VideoLLM]:
    """A run with final weights, and the model that they are of."""
    model = build_model(made)
    initialize(model, made)
    model.to(dtype)
    save_weights(model, folder / "run" / "final", made)
    return folder / "run", model.eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def published(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {to_hf_name(name): parameter.detach() for name, parameter in model.named_parameters()}


def reference(made: Manifest) -> Shapes:
    """The tensors of a UMT release, written out."""
    width, language = made.model.vision_tower.width, made.model.language_model
    tower = shapes.umt(width, made.model.vision_tower.depth - 1)
    config = dataclasses.asdict(language)
    return tower | shapes.connector(width, language.hidden_size) | shapes.language_model(config)


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied"])
@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one_file", "shards"])
def test_exported_weights_are_read_back_bit_for_bit(tmp_path, limit, tied):
    run, model = finished(tmp_path, settings(tied))
    export(run, tmp_path / "out", shard_bytes=limit)
    written = tensors(tmp_path / "out")
    assert {name: tuple(value.shape) for name, value in written.items()} == reference(settings(tied))
    assert ("lm_head.weight" in written) is not tied
    assert_same(written, published(model))
    if limit < 10**9:
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert index["weight_map"].keys() == written.keys() and len(set(index["weight_map"].values())) > 2
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in written.values())
    else:
        assert not (tmp_path / "out" / INDEX).exists() and (tmp_path / "out" / "model.safetensors").is_file()
    again = load_pretrained(tmp_path / "out")
    assert_same(published(again), published(model))
    batch = pack([dialogue(0, clips=1, stills=1), dialogue(1)])
    with torch.no_grad():
        assert torch.equal(
            again.language_model.lm_head(again.hidden(batch)), model.language_model.lm_head(model.hidden(batch))
        )


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied"])
def test_transformers_reads_the_language_model(tmp_path, tied):
    run, model = finished(tmp_path, settings(tied), torch.float32)
    export(run, tmp_path / "out", shard_bytes=20_000)
    config = Qwen2Config.from_dict(json.loads((tmp_path / "out" / "config.json").read_text()))
    theirs, found = Qwen2ForCausalLM.from_pretrained(tmp_path / "out", config=config, output_loading_info=True)
    assert not found["missing_keys"] and not found["mismatched_keys"]
    assert all("vision_tower" in name or "mm_projector" in name for name in found["unexpected_keys"])
    batch = pack([dialogue(2, text=40)])
    with torch.no_grad():
        logits = theirs.eval()(batch.input_ids.unsqueeze(0)).logits[0]
        torch.testing.assert_close(model.language_model.lm_head(model.hidden(batch)), logits, atol=1e-5, rtol=1e-5)


def test_transformers_reads_tokenizer_and_generation_settings(tmp_path):
    export(finished(tmp_path, settings())[0], tmp_path / "out")
    ours, theirs = AutoTokenizer.from_pretrained(TOKENIZER), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>user\nWhich colour?<|im_end|>\n"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (TOKENIZER / name).read_bytes()
    generation = GenerationConfig.from_pretrained(tmp_path / "out")
    assert generation.do_sample is False and generation.pad_token_id == 1000
    assert generation.eos_token_id == [1002, 1000]


@pytest.mark.parametrize("eos", ["<|endoftext|>", None])
def test_an_exported_base_tokenizer_ends_answers_with_the_turn(tmp_path, eos):
    folder = tmp_path / "tokenizer"
    shutil.copytree(TOKENIZER, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": eos}))
    export(finished(tmp_path, with_tokenizer(folder))[0], tmp_path / "out")
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1002, 1000]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == (1000 if eos else 1002)


PUBLISHED = {
    "frame_aspect_ratio": "square",
    "frame_grid_pinpoints": None,
    "mm_local_num_frames": 4,
    "mm_newline_position": "nothing",
    "mm_projector_type": "tome16_mlp_hd64",
    "mm_vision_select_layer": -2,
    "vision_encode_type": "video_image",
    "mm_llm_compress": False,
    "tokenizer_padding_side": "right",
    "architectures": ["VideoChatFlashQwenForCausalLM"],
    "model_type": "videochat_flash_qwen",
}


@pytest.mark.parametrize(
    ("size", "mode", "tower", "aspect", "merge"),
    [
        (224, "anyres_nopad", "umt-large", "anyres_nopad", "spatial_nopad"),
        (448, "anyres_nopad", "umt-hd-large", "anyres_nopad", "spatial_nopad"),
        (224, "square", "umt-large", "square", "flat"),
    ],
)
def test_config_has_the_published_keys(tmp_path, size, mode, tower, aspect, merge):
    run, _ = finished(tmp_path, settings(size=size, images=ImagesConfig(mode=mode)))
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in PUBLISHED} == PUBLISHED
    assert config["mm_vision_tower"] == tower and config["mm_hidden_size"] == SMALL.vision_tower.width
    assert (config["image_aspect_ratio"], config["mm_patch_merge_type"]) == (aspect, merge)
    assert config["image_grid_pinpoints"] == [[size * w, size * h] for w in range(1, 7) for h in range(1, 7)]
    assert config["auto_map"]["AutoModel"] == "modeling_videochat_flash.VideoChatFlashQwenForCausalLM"
    assert config["tokenizer_model_max_length"] == 8192 and config["torch_dtype"] == "bfloat16"
    compress = ("llm_compress_type", "llm_compress_layer_list", "llm_image_token_ratio_list", "mm_pos_num_frames")
    assert all(name in config for name in compress)
    assert config["rope_theta"] == SMALL.language_model.rope_theta and config["vocab_size"] == 1024
    assert str(tmp_path) not in json.dumps(config) and str(ROOT) not in json.dumps(config)


@pytest.mark.parametrize("path", files("multimodal_sequence/config.json"), ids=lambda path: path.parent.name)
def test_golden_settings_are_in_config(tmp_path, path):
    wanted = json.loads(path.read_text())["settings"]
    size = min(min(pair) for pair in wanted["image_grid_pinpoints"])
    grid = max(max(pair) for pair in wanted["image_grid_pinpoints"]) // size
    images = ImagesConfig(mode=wanted["image_aspect_ratio"], max_grid=grid)
    run, _ = finished(tmp_path, settings(size=size, images=images))
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    own = {"mm_hidden_size", "tokenizer_model_max_length", "mm_vision_tower"}  # of the model, not of the layout
    assert {name: config[name] for name in wanted.keys() - own} == {n: v for n, v in wanted.items() if n not in own}


def test_internvideo2_is_exported_under_its_own_names(tmp_path):
    tower = VisionTowerConfig(type="internvideo2", width=64, depth=3, heads=4, patch=14, mlp_ratio=48 / 11)
    cfg = ModelConfig(vision_tower=tower, language_model=dataclasses.replace(SMALL.language_model, vocab_size=1024))
    made = dataclasses.replace(settings(size=224), model=cfg)
    run, model = finished(tmp_path, made)
    export(run, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["mm_vision_tower"], config["mm_hidden_size"]) == ("internvideo2", 64)
    names = [name for name in tensors(tmp_path / "out") if "vision_tower" in name]
    assert len(names) == 5 + 13 * 2 and "model.vision_tower.vision_tower.blocks.1.ls2.weight" in names
    again = load_pretrained(tmp_path / "out")
    assert all(torch.equal(p, dict(again.named_parameters())[name]) for name, p in model.named_parameters())
    config = released_config(mm_vision_tower="internvideo2", mm_hidden_size=1408)
    assert parse_hf_config(config, "config.json")[0].vision_tower.depth == 40


# Released folders -----------------------------------------------------------------------------------------------------


def released_config(**fields) -> dict:
    """config.json of the published 7B model at 448 pixels, as far as a reader needs it."""
    language = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    language |= {"num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768}
    language |= {"rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    return {**PUBLISHED, **language, "mm_vision_tower": "umt-hd-large", "mm_hidden_size": 1024, **fields}


def test_a_released_config_is_the_manifests_model():
    model, size, clip_frames = parse_hf_config(released_config(), "config.json")
    stage4 = load_manifest(ROOT / "manifests" / "stage4.yaml")
    assert (model, size, clip_frames) == (stage4.model, 448, 4)
    assert is_hf_release(released_config(model_type="qwen2"))
    assert not describe_tower_mismatch(ReleaseConfig(model, stage4.frames, stage4.images, stage4.text, "bfloat16"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mm_vision_tower": "clip"}, "mm_vision_tower: 'clip' is not one of umt-large"),
        ({"mm_hidden_size": 64}, "mm_hidden_size: 64 is not 1024; this is another model"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling is {'type': 'yarn'}; this is another model"),
        ({"mm_llm_compress": True}, "mm_llm_compress is True; this is another model"),
        ({"mm_vision_select_layer": -1, "hidden_act": "gelu"}, "hidden_act is 'gelu', mm_vision_select_layer is -1"),
        ({"hidden_size": "wide"}, "hidden_size: expected a whole number"),
        ({"framestream": 5}, "framestream.frames: expected a mapping"),
        ({"framestream": {"frames": {"size": 224}}}, "framestream.frames.sampler: required field is missing"),
    ],
)
def test_released_configs_of_other_models_are_refused(fields, message):
    with pytest.raises(ManifestError) as error:
        parse_hf_config(released_config(**fields), "here/config.json")
    assert message in str(error.value) and str(error.value).startswith("here/config.json: ")


def test_a_released_config_without_qwen2s_keys_is_refused():
    config = released_config()
    del config["vocab_size"], config["hidden_size"]
    with pytest.raises(ManifestError, match="hidden_size, vocab_size: missing"):
        parse_hf_config(config, "config.json")


@pytest.mark.parametrize("text", ["not json", "[1]"])
def test_damaged_configs_are_one_line(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(WeightsError, match=r"config\.json: (not JSON|a list)"):
        load_pretrained(tmp_path)


def test_parts_and_runs_start_from_a_released_folder(tmp_path):
    run, model = finished(tmp_path, settings(), torch.float32)
    out = tmp_path / "released"
    export(run, out, shard_bytes=20_000)
    wanted = published(model)
    other = dataclasses.replace(settings(), seed=6)
    for part in model.parts():
        given = {"vision_tower": "random", "language_model": "random", part: str(out)}
        started = build_model(other)
        initialize(started, dataclasses.replace(other, init_from=InitFromConfig(**given)))
        for name, parameter in started.named_parameters():
            same = torch.equal(parameter, wanted[to_hf_name(name)])
            assert same or not name.startswith(part + "."), name
            assert not same or name.startswith(part + ".") or parameter.ndim == 1, name
    larger = settings(size=192)  # positions are computed: nothing to convert
    started = build_model(larger)
    initialize(started, dataclasses.replace(larger, init_from=InitFromConfig(run=str(out))))
    assert_same(published(started), wanted)


def released_golden(folder: Path) -> None:
    """The golden weights as a released checkpoint: two shards with an index, and config.json."""
    values = load_file(golden.FILES / "weights.safetensors")
    names = sorted(values)
    located = {}
    folder.mkdir()
    for n, share in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{n:05d}-of-00002.safetensors"
        save_file({name: values[name] for name in share}, folder / file, metadata={"format": "pt"})
        located |= dict.fromkeys(share, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": located}))
    language = {**golden.CONFIG["language_model"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**PUBLISHED, **language, **golden.CONFIG["settings"]}))


@pytest.fixture(scope="module")
def golden_models(tmp_path_factory) -> list[VideoLLM]:
    """The golden release as the start of a run, and after that run was exported and loaded."""
    folder = tmp_path_factory.mktemp("golden")
    released_golden(folder / "released")
    tower, language = golden.CONFIG["vision_tower"], dict(golden.CONFIG["language_model"])
    del language["hidden_act"]
    cfg = ModelConfig(
        vision_tower=VisionTowerConfig(width=tower["width"], depth=tower["depth"], heads=tower["heads"]),
        language_model=LanguageModelConfig(**language),
    )
    made = settings(size=tower["size"])
    text = dataclasses.replace(made.text, max_tokens=language["max_position_embeddings"])
    made = dataclasses.replace(made, model=cfg, text=text)
    parts = dict.fromkeys(("vision_tower", "connector", "language_model"), str(folder / "released"))
    started = build_model(made)
    initialize(started, dataclasses.replace(made, init_from=InitFromConfig(**parts)))
    save_weights(started, folder / "run" / "final", made)
    export(folder / "run", folder / "exported")
    assert_same(tensors(folder / "exported"), load_file(golden.FILES / "weights.safetensors"))
    models = [started.eval(), load_pretrained(folder / "exported")]
    for model in models:  # golden pixels are normalized already
        model.vision_tower.normalize = lambda frames: frames.movedim(-1, 1)
    return models


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c["case"]) for c in golden.CASES if c["padding"] == "right" and len(c["input_ids"]) == 1],
)
def test_golden_logits_of_a_released_folder(golden_models, case):
    rows, outputs = golden.dialogues(case), np.load(golden.FILES / "outputs.npz")
    batch = pack(rows, golden.CONFIG["vision_tower"]["size"])
    tail = torch.from_numpy(outputs[f"{case['case']}.logits_tail"])[0]
    with torch.no_grad():
        logits = [model.language_model.lm_head(model.hidden(batch)) for model in golden_models]
    torch.testing.assert_close(logits[0][-len(tail) :], tail, atol=5e-4, rtol=0)
    assert torch.equal(*logits)


# The command ----------------------------------------------------------------------------------------------------------


def test_python_files_of_the_release_are_copied_and_not_run(tmp_path):
    run, _ = finished(tmp_path, settings())
    code = tmp_path / "code"
    (code / "inner.py").mkdir(parents=True)
    (code / CODE).write_text("raise SystemExit('run')\n")
    (code / "mm_utils.py").write_text("x = 1\n")
    (code / "README.md").write_text("no code")
    (code / "linked.py").symlink_to(tmp_path / "run" / "final" / "config.json")
    command = ["--checkpoint", str(run / "final"), "--out", str(tmp_path / "out"), "--release-files", str(code)]
    done = corpus.run(sys.executable, "-m", "trainer.export", *command)
    assert done.stdout.startswith(f"{run / 'final'}: exported to {tmp_path / 'out'}\n")
    assert "frames.size 128 instead of 224" in done.stdout
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {CODE, "mm_utils.py"}
    assert (tmp_path / "out" / CODE).read_text() == "raise SystemExit('run')\n"
    assert {path.name for path in (tmp_path / "out").iterdir() if path.suffix not in (".py", ".json")} == {
        "model.safetensors",
        "README.md",
    }


@pytest.mark.parametrize(
    ("break_it", "status", "message"),
    [
        (lambda t: shutil.rmtree(t / "run" / "final"), 2, "run: no weights there; name a RUN"),
        (lambda t: (t / "out").mkdir() or (t / "out" / "x").touch(), 2, "out: is there already"),
        (lambda t: (t / "out").touch(), 2, "out: is there already"),
        (lambda t: (t / "out").symlink_to(t / "run"), 2, "out: is there already"),
        (lambda t: (t / "code" / CODE).unlink(), 2, f"code: no {CODE} there"),
        (lambda t: change(t, model_type="qwen2"), 2, "model_type is 'qwen2'; name the `final` folder"),
        (lambda t: change(t, dtype="complex64"), 1, "dtype: 'complex64' is not one of bfloat16"),
        (lambda t: change(t, dtype={"a": 1}), 1, "dtype: {'a': 1} is not one of bfloat16"),
        (lambda t: change(t, frames={"size": 128}), 2, "config.json: frames.sampler: required field"),
        (lambda t: change(t, text={"tokenizer": "./nowhere"}), 2, "text.tokenizer: ./nowhere is not a folder"),
        (
            lambda t: (t / "run" / "final" / "model.safetensors").write_bytes(b"no"),
            1,
            "model.safetensors: damaged (its",
        ),
        (lambda t: (t / "run" / "final" / "config.json").write_text("{"), 1, "config.json: not JSON"),
        (lambda t: drop(t, "model.norm.weight"), 1, "missing: language_model.model.norm.weight"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, capsys, break_it, status, message):
    run, _ = finished(tmp_path, settings())
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / CODE).touch()
    break_it(tmp_path)
    before = sorted(tmp_path.iterdir())
    command = ["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--release-files", str(tmp_path / "code")]
    assert main(command) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert sorted(tmp_path.iterdir()) == before


def change(folder: Path, **fields) -> None:
    """Write a config.json with other fields, and a digest that fits."""
    path = folder / "run" / "final" / "config.json"
    write_record(path, read_record(path, "config", "") | fields)


def drop(folder: Path, name: str) -> None:
    path = folder / "run" / "final" / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if key != name}, path)
    change(folder, digests={path.name: file_digest(path)})


# Checkpoints of several ranks -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    return corpus.make(tmp_path_factory.mktemp("corpus"), videos=4)


@pytest.mark.parametrize(
    ("ranks", "zero_stage", "dtype", "tied"), [(2, 3, "bf16", True), (2, 1, "bf16", False)], ids=["zero3", "zero1"]
)
def test_checkpoints_of_ranks_equal_the_final_weights(shards, tmp_path, ranks, zero_stage, dtype, tied):
    """A frozen part is in no checkpoint: it comes from the manifest's ``init_from``."""
    run = tmp_path / "run"
    fields = (f"output={run}", "train.max_steps=2", f"train.zero_stage={zero_stage}", f"train.dtype={dtype}")
    frozen = ("train.vision_tower={train: false}", f"model.language_model.tie_word_embeddings={str(tied).lower()}")
    corpus.run(*corpus.train_command(shards, ranks, *fields, *frozen))
    export(run, tmp_path / "final")
    shutil.move(run / "final", tmp_path / "moved")
    checkpoint = run / "checkpoints" / "step-000002"
    export(run, tmp_path / "newest")
    export(checkpoint, tmp_path / "step", shard_bytes=100_000)
    write_pointer(run / "checkpoints" / "best", checkpoint.name)
    export(run / "checkpoints" / "best", tmp_path / "best")
    wanted = tensors(tmp_path / "final")
    assert {value.dtype for value in wanted.values()} == {torch.bfloat16 if dtype == "bf16" else torch.float32}
    assert_same(tensors(tmp_path / "newest"), wanted)
    assert_same(tensors(tmp_path / "step"), wanted)
    assert_same(tensors(tmp_path / "best"), wanted)
    assert (tmp_path / "step" / "config.json").read_bytes() == (tmp_path / "final" / "config.json").read_bytes()
    sound = (checkpoint / "state.json").read_bytes()
    for path, damage, message in (
        (checkpoint / "state.json", lambda path: state(path, settings={"seed": 9}), "other settings"),
        (checkpoint / "state.json", lambda path: path.write_text("{"), "state.json: not a state of a checkpoint"),
        (sorted(checkpoint.glob("*optim_states.pt"))[-1], flip, "optim_states.pt: damaged (its digest differs); "),
        (sorted(checkpoint.glob("*optim_states.pt"))[-1], trap, "cannot be read"),
        (sorted(checkpoint.glob("*optim_states.pt"))[-1], Path.unlink, "optim_states.pt: is missing"),
    ):
        kept = path.read_bytes()
        damage(path)
        with pytest.raises(WeightsError) as error:
            export(run, tmp_path / "none")
        assert message in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(kept)
        (checkpoint / "state.json").write_bytes(sound)
    assert not (checkpoint / "executed").exists() and not (tmp_path / "none").exists()


def test_a_missing_checkpoint_is_answered_with_those_that_are_there(tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in (2, 4, 6, 8, 10, 1_000_000):
        (checkpoints / f"step-{step:06d}").mkdir(parents=True)
        (checkpoints / f"step-{step:06d}" / "state.json").touch()
    listed = "step-000004, step-000006, step-000008, step-000010, step-1000000"
    with pytest.raises(ExportError, match=f"step-000009: no such checkpoint; the newest of 6 are {listed}$"):
        export(checkpoints / "step-000009", tmp_path / "out")
    write_pointer(checkpoints / "best", "step-000009")
    fix = "names step-000009, which does not exist; name one of .*/checkpoints/step-[*]$"
    with pytest.raises(WeightsError, match=f"best: {fix}"):
        export(checkpoints / "best", tmp_path / "out")
    (checkpoints / "best").write_text('{"checkpoint": "../../x"}')
    with pytest.raises(
        WeightsError, match=r"best: not a pointer to a checkpoint; name one of .*/checkpoints/step-[*]$"
    ):
        export(checkpoints / "best", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def state(path: Path, **changes: object) -> None:
    """Write a state.json with other fields, and a digest that fits."""
    write_record(path, read_record(path, "state", "") | changes)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def trap(path: Path) -> None:
    """Make a file that runs a program when it is unpickled; its size and digest in state.json are right."""

    class Trap:
        def __reduce__(self):
            return (subprocess.run, (["touch", str(path.parent / "executed")],))

    torch.save({"optimizer_state_dict": Trap()}, path)
    stored, name = read_record(path.parent / "state.json", "state", ""), path.name
    changed = {"files": path.stat().st_size, "digests": file_digest(path)}
    state(path.parent / "state.json", **{field: stored[field] | {name: value} for field, value in changed.items()})
