"""The typed manifest: what it accepts, and that every refusal is one line naming the file, the field and the fix."""

from __future__ import annotations

import copy
import dataclasses
import random
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.config.manifest import (
    BuildManifest,
    Manifest,
    ManifestError,
    load_build_manifest,
    load_manifest,
)
from framestream.pipeline.config.schema import from_dict, to_dict
from framestream.pipeline.config.training import LoraConfig, TrainConfig
from framestream.pipeline.config.yaml_files import apply_override, merge_mappings

SMALL = {
    "stage": 2,
    "output": "out",
    "data": {"entries": [{"annotation": "some/clips.jsonl", "root": "media"}]},
    "frames": {"sampler": "dynamic_fps1", "min": 4, "max": 8, "size": 144},
    "text": {"tokenizer": "words"},
    "batching": {"global_batch": 16, "row_multiple": 4},
    "init_from": {"vision_tower": "random", "language_model": "random"},
    "train": {part: {"train": True, "lr": 0.001} for part in ("vision_tower", "connector", "language_model")},
}


SHARDS_ALONE = {name: SMALL[name] for name in ("stage", "data", "frames")}


def write(folder: Path, value: object, name: str = "m.yaml") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else yaml.safe_dump(value), encoding="utf-8")
    return path


def refusal(path: Path, overrides: tuple[str, ...] = ()) -> str:
    with pytest.raises(ManifestError) as caught:
        load_manifest(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def all_fields(cls: type, path: str = "") -> Iterator[tuple[str, dataclasses.Field, type]]:
    """(dotted name, field, type) of every field below ``cls`` that is no section, entries of lists included."""
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        options = [item for item in (hint, *typing.get_args(hint)) if item not in (type(None), Ellipsis)]
        section = next((item for item in options if dataclasses.is_dataclass(item)), None)
        if section:
            yield from all_fields(section, f"{path}{field.name}{'[0]' if typing.get_origin(hint) is tuple else ''}.")
        else:
            yield f"{path}{field.name}", field, next(iter(typing.get_args(hint)), hint)


def nested(field: str, value: object) -> dict:
    """The mapping in which a dotted ``field`` has a value; ``[0]`` is the only item of a list."""
    for name in reversed(field.split(".")):
        value = {name.removesuffix("[0]"): [value] if name.endswith("[0]") else value}
    return value


NUMBERS = {name: field for name, field, kind in all_fields(Manifest) if kind in (int, float)}
#: text that is no path
WORDS = {
    "name",
    "data.entries[0].name",
    "data.entries[0].sampling",
    "frames.sampler",
    "text.system",
    "train.gradient_checkpointing",
    *(f"train.{part}.lora.targets" for part in ("vision_tower", "connector", "language_model")),
    "train.tracker_project",
    "train.trackers",
    "mix[0].entries[0].entry",
    "mix[0].entries[0].sampling",
}
PATHS = {
    name: field.metadata["path"]
    for name, field, kind in all_fields(Manifest)
    if kind is str and name not in WORDS and not field.metadata["choices"]
}


def leaves(cls: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type]]:
    """(path, annotation) of every field below ``cls``; the entries of a list are left out."""
    for name, hint in typing.get_type_hints(cls).items():
        options = [option for option in typing.get_args(hint) if dataclasses.is_dataclass(option)]
        if dataclasses.is_dataclass(hint):
            yield from leaves(hint, (*path, name))
        elif not (options and typing.get_origin(hint) is not tuple):
            yield (*path, name), hint


def test_defaults_are_resolved(tmp_path):
    manifest = load_manifest(write(tmp_path, SMALL, "tiny.yaml"))
    assert manifest.name == "tiny"
    assert manifest.data.entries[0].name == "clips"
    assert manifest.shard_root == Path("shards/stage2")
    assert (manifest.train.dtype, manifest.train.zero_stage, manifest.frames.clip_frames) == ("bf16", 3, 4)


def test_drop_path_of_internvideo2_is_the_published_one(tmp_path):
    path = write(tmp_path, SMALL)
    for settings, expected in (("{type: internvideo2}", 0.25), ("{type: internvideo2, drop_path: 0.0}", 0.0)):
        assert load_manifest(path, (f"model.vision_tower={settings}",)).model.vision_tower.drop_path == expected
    assert load_manifest(path).model.vision_tower.drop_path is None


def test_printed_manifest_reads_back_the_same(tmp_path):
    manifest = load_manifest(write(tmp_path, SMALL))
    printed = yaml.safe_dump(to_dict(manifest))
    assert load_manifest(write(tmp_path, printed, "again.yaml")) == manifest
    with pytest.raises(dataclasses.FrozenInstanceError):
        manifest.stage = 3


def test_gradient_checkpointing_has_levels(tmp_path):
    """``true`` and ``false`` are the values of manifests that earlier runs have written."""
    path, field = write(tmp_path, SMALL), "train.gradient_checkpointing"
    levels = {
        "true": (True, 28),
        "all": (True, 28),
        "auto": (True, 28),
        "false": (False, 0),
        "none": (False, 0),
        "tower": (True, 0),
        "layers:3": (True, 3),
    }
    for level, expected in levels.items():
        assert load_manifest(path, (f"{field}={level}",)).train.recomputation(28) == expected
    assert load_manifest(path, (f"{field}=true",)).train.gradient_checkpointing == "all"
    for level in ("layers", "layers:-1", "layers:x", "everything"):
        assert f"{field}: '{level}' is not one of none, tower, layers:K" in refusal(path, (f"{field}={level}",))
    assert f"{field}: layers:99 of 28 layers; use all" in refusal(path, (f"{field}=layers:99",))


@pytest.mark.parametrize(
    ("where", "wrong", "right"),
    [
        ("", "frame", "frames"),
        ("frames", "sampller", "sampler"),
        ("batching", "global_batches", "global_batch"),
        ("train", "warm_up", "warmup"),
        ("train.connector", "zzz", None),
        ("model.vision_tower", "widht", "width"),
    ],
)
def test_unknown_field_suggests_the_nearest(tmp_path, where, wrong, right):
    path = write(tmp_path, SMALL)
    field = f"{where}.{wrong}" if where else wrong
    message = refusal(path, (f"{field}=1",))
    hint = f"did you mean `{right}`?" if right else "the fields are train, lr, weight_decay, lora"
    assert message == f"--set {field}=1: {field}: unknown field; {hint}"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("train.language_model.lora.rank", [item.name for item in dataclasses.fields(LoraConfig)]),
        ("train.patience", [item.name for item in dataclasses.fields(TrainConfig)]),
    ],
)
def test_fields_are_listed_when_none_is_near(tmp_path, field, fields):
    message = refusal(write(tmp_path, SMALL), (f"{field}=4",))
    more = f" and {len(fields) - 10} more" if len(fields) > 10 else ""
    assert message.endswith(f"{field}: unknown field; the fields are {', '.join(fields[:10])}{more}")


def test_unknown_field_of_an_entry_names_its_position(tmp_path):
    value = copy.deepcopy(SMALL)
    value["data"]["entries"].append({"annotaton": "x.json"})
    path = write(tmp_path, value)
    line = path.read_text(encoding="utf-8").splitlines().index("  - annotaton: x.json") + 1
    assert refusal(path) == f"{path}:{line}: data.entries[1].annotaton: unknown field; did you mean `annotation`?"


@pytest.mark.parametrize(
    ("field", "hint"), list(leaves(Manifest)), ids=lambda item: ".".join(item) if type(item) is tuple else ""
)
def test_every_field_refuses_a_wrong_type(tmp_path, field, hint):
    path = write(tmp_path, SMALL)
    wrong = "{a: 1}" if hint is not dict else "text"
    assignment = f"{'.'.join(field)}={wrong}"
    message = refusal(path, (assignment,))
    assert message.startswith(f"--set {assignment}: {'.'.join(field)}: expected ")
    assert "(dict)" in message


@pytest.mark.parametrize(
    ("assignment", "start"),
    [
        ("stage=two", "stage: expected a whole number, got 'two' (str)"),
        ("stage=true", "stage: expected a whole number, got True (bool)"),
        ("stage=2.0", "stage: expected a whole number, got 2.0 (float)"),
        ("stage=5", "stage: 5 (int) is not one of 1, 2, 3, 4"),
        ("train.warmup=true", "train.warmup: expected a number"),
        ("train.warmup=.nan", "train.warmup: expected a number"),
        ("train.connector.lr=.inf", "train.connector.lr: expected a number"),
        ("train.warmup=500", "train.warmup: must be at most 1, got 500.0 (a share of all steps, which train.epochs"),
        ("train.beta2=1.0", "train.beta2: must be at most 0.999999, got 1.0"),
        ("seed=18446744073709551616", "seed: must be at most 9,223,372,036,854,775,807, got 18446744073709551616"),
        ("frames.sampler=fps²", "frames.sampler: 'fps²' is not"),
        ("loader.access=sequential", "loader.access: sequential needs room for copies; set loader.cache_gb"),
        ("frames.sampler=fps1e9", "frames.sampler: 'fps1e9' is not"),
        ("frames.sampler=fps99999", "frames.sampler: 'fps99999' is not"),
        ("data.entries=[{annotation: a, sampling: 'first:150%'}]", "data.entries[0].sampling: first:150% is more"),
        ("output=", "output: expected text"),
        ("output=''", "output: is empty; give a path"),
        ("output=s3://bucket/run", "output: s3://bucket/run is an address; give a path on this machine"),
        ('output="a\\nb"', "output: 'a\\nb' has a control character"),
        ("train.connector.lr=-1", "train.connector.lr: must be at least 0"),
        ("train.connector.lr=0", "train.connector.lr: a trained part needs a learning rate above 0"),
        (
            "train.trackers=[wanbd]",
            "train.trackers[0]: 'wanbd' is not one of mlflow, swanlab, trackio, wandb; did you mean `wandb`?",
        ),
        ("train.trackers=[zz]", "train.trackers[0]: 'zz' is not one of mlflow, swanlab, trackio, wandb"),
        ("train.trackers=[wandb, wandb]", "train.trackers[1]: 'wandb' is listed twice"),
        ("train.trackers=[tensorboard]", "train.trackers[0]: 'tensorboard' needs no entry, because RUN/tensorboard is"),
        ("train.trackers=wandb", "train.trackers: expected a list, got 'wandb' (str); write [wandb]"),
        ("train.trackers=3", "train.trackers: expected a list, got 3 (int)"),
        ("train.tracker_project='a/b'", "train.tracker_project: 'a/b' is no name of a project; use up to 100 letters"),
        ("evaluate.patience=3", "evaluate.patience: nothing is validated; set evaluate.every to a number of steps"),
        ("evaluate.best=bleu", "evaluate.best: 'bleu' (str) is not one of loss, accuracy, likelihood, miou"),
        ("evaluate.every=-1", "evaluate.every: must be at least 0, got -1"),
        ("evaluate.questions=0", "evaluate.questions: must be at least 1, got 0"),
        ("train.dtype=bf-16", "train.dtype: 'bf-16' (str) is not one of bf16, fp32; did you mean `bf16`?"),
        ("frames=8", "frames: expected a mapping with the fields of Frames, got 8 (int)"),
        ("batching.cost=3", "batching.cost: expected a mapping with the fields of Cost, got 3 (int)"),
        ("data.entries=clips.json", "data.entries: expected a list, got 'clips.json' (str)"),
        ("data.entries=[]", "data.entries: the list is empty"),
        ("frames.sampler=midle", "frames.sampler: 'midle' is not middle, dynamic_fps1, rand or fpsX"),
        ("frames.sampler=fps0", "frames.sampler: 'fps0' is not"),
        ("frames.max=10", "frames.max: 10 is not a multiple of clip_frames (4)"),
        ("frames.min=12", "frames.min: 12 is larger than max (8)"),
        ("frames.size=100", "frames.size: 100 is not a multiple of model.vision_tower.patch (16)"),
        ("frames.size=112", "frames.size: 112 gives 49 patches; a tile needs at least 64"),
        ("model.vision_tower.heads=7", "model.vision_tower.heads: 7 does not divide width (1024)"),
        ("model.vision_tower.type=uml", "model.vision_tower.type: 'uml' (str) is not one of umt, internvideo2"),
        ("model.vision_tower.drop_path=0.25", "model.vision_tower.drop_path: not supported by umt"),
        (
            "model.vision_tower={type: internvideo2, drop_path: 1.0}",
            "model.vision_tower.drop_path: must be at most 0.99, got 1.0",
        ),
        ("model.vision_tower={type: internvideo2, width: 24, heads: 2}", "model.vision_tower.width: 24 is not a mult"),
        (
            "model.language_model.max_position_embeddings=4096",
            "text.max_tokens: 32768 is more than model.language_model.max_position_embeddings (4096); lower it",
        ),
        ("init_from.vision_tower=", "init_from.vision_tower: expected text"),
        ("init_from.vision_tower=''", "init_from: name a run, or vision_tower and language_model"),
        ("init_from={run: out/}", "init_from.run: out/ is this run's own output; name the stage before it"),
    ],
)
def test_bad_value_names_file_and_field(tmp_path, assignment, start):
    path = write(tmp_path, SMALL)
    message = refusal(path, (assignment,))
    assert message.startswith(f"--set {assignment}: {start}")


def test_parameters_are_offloaded_under_zero_3_alone(tmp_path):
    path = write(tmp_path, SMALL)
    assert load_manifest(path, ("train.offload=all",)).train.zero_stage == 3
    message = refusal(path, ("train.offload=all", "train.zero_stage=2"))
    assert message.startswith("--set train.zero_stage=2: train.offload: all needs zero_stage 3")


def test_adapters_are_set_part_by_part(tmp_path):
    path = write(tmp_path, SMALL)
    lora = "train.language_model.lora={r: 8, targets: [q_proj, v_proj], load: 4bit}"
    train = load_manifest(path, (lora, "train.zero_stage=2")).train
    assert train.language_model.lora == LoraConfig(r=8, targets=("q_proj", "v_proj"), load="4bit")
    assert train.language_model.lora.alpha == 16 and train.connector.lora is None
    for part in ("vision_tower", "connector", "language_model"):
        frozen = (f"train.{part}.train=false", f"train.{part}.lora.r=4")
        message = refusal(path, frozen)
        assert f"train.{part}.lora: with train: false no adapters are trained; set train: true and a " in message
        assert load_manifest(path, (*frozen, f"train.{part}.lora=null")).train.zero_stage == 3
    message = refusal(path, (lora,))
    assert "train.language_model.lora.load: 4bit does not work with zero_stage 3; set 1 or 2, or" in message
    for wrong, fault in (
        ("{}", "train.language_model.lora.r: required field is missing"),
        ("{r: 0}", "train.language_model.lora.r: must be at least 1, got 0 (rank of the adapters)"),
        ("{r: 8, load: 3bit}", "train.language_model.lora.load: '3bit' (str) is not one of full, 8bit, 4bit"),
        ("{r: 8, target: []}", "train.language_model.lora.target: unknown field; did you mean `targets`?"),
    ):
        assert fault in refusal(path, (f"train.language_model.lora={wrong}",))


def test_a_stage_is_continued_by_name(tmp_path):
    write(tmp_path, {"output": "runs/first"}, "base.yaml")
    write(tmp_path, {"extends": "base.yaml", "stage": 1}, "stage1.yaml")
    goes_on = {**SMALL, "init_from": {"run": "stage1", "connector": "random"}}
    start = load_manifest(write(tmp_path, goes_on)).init_from
    assert (start.run, start.connector) == ("runs/first", "random")
    for run in ("./stage1", "runs/stage1", "stage0", "hf:acme/stage1"):
        assert load_manifest(tmp_path / "m.yaml", (f"init_from.run={run}",)).init_from.run == run
    write(tmp_path, {"stage": 1}, "stage1.yaml")
    message = refusal(tmp_path / "m.yaml")
    assert (
        message
        == f"{tmp_path}/m.yaml:15: init_from.run: {tmp_path}/stage1.yaml has no output; give it one, or name a folder"
    )
    write(tmp_path, {"extends": "m.yaml"}, "stage1.yaml")
    assert "init_from.run: out is this run's own output" in refusal(tmp_path / "m.yaml")


@pytest.mark.parametrize("name", sorted(set(SMALL) - {"text"}) + ["text"])
def test_missing_field_is_named(tmp_path, name):
    path = write(tmp_path, {key: value for key, value in SMALL.items() if key != name})
    assert refusal(path) == f"{path}: {name}: required field is missing; add `{name}: ...`"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("stage: [1", "not valid YAML"),
        ("- stage: 1", "expected a mapping of fields at the top level"),
        ("", "expected a mapping of fields at the top level"),
        ("stage: 1\nseed: 1\nstage: 2\n", "`stage` is given twice"),
        ("extends: []", "extends: expected a file name or a list of them, got [] (list)"),
        ("extends: [3]", "extends: expected a file name or a list of them"),
        ("extends: nowhere.yaml", "m.yaml:1: extends: PATH/nowhere.yaml: no such file"),
        ("extends: [nowhere.yaml]", "m.yaml:1: extends: PATH/nowhere.yaml: no such file"),
        ("extends: https://host/a.yaml", "m.yaml:1: extends: https://host/a.yaml is an address; give a file on this"),
        ("data: {catalogs: ['s3://b/a.yaml']}", "m.yaml:1: data.catalogs: s3://b/a.yaml is an address; give a file"),
        ("extends: m.yaml", "extends: the file extends itself"),
        ("extends: [m.yaml]", "extends: the file extends itself"),
    ],
)
def test_unreadable_file(tmp_path, text, part):
    assert part.replace("PATH", str(tmp_path)) in refusal(write(tmp_path, text))


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_bytes(b"\xff\xd8\xff\xe0")
    assert refusal(path) == f"{path}:1: not valid YAML: not UTF-8 text (byte 0xff); save it as UTF-8"
    assert "cannot be read (Is a directory)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("train.connector.lr", "1e-5", 1e-5),
        ("train.max_steps", "010", 10),
        ("train.max_steps", "0o10", 8),
        ("name", "2024-01-01", "2024-01-01"),
        ("name", "no", "no"),
        ("name", "1:30", "1:30"),
        ("name", "1_000", "1_000"),
    ],
)
def test_values_have_the_meaning_of_yaml_1_2(tmp_path, field, text, value):
    """YAML 1.1 reads 1e-5 as text, 010 as 8, 1:30 as 90, and no as false."""
    section, _, name = field.rpartition(".")
    manifest = load_manifest(write(tmp_path, SMALL), (f"{field}={text}",))
    for part in filter(None, section.split(".")):
        manifest = getattr(manifest, part)
    assert getattr(manifest, name) == value


@pytest.mark.parametrize(
    ("assignment", "fix"),
    [
        ("train.check_calls=yes", "expected true or false, got 'yes' (str); write true"),
        ("train.check_calls=Off", "expected true or false, got 'Off' (str); write false"),
        ("train.max_steps=1_000", "expected a whole number, got '1_000' (str); write 1000"),
        ("train.max_steps=1e3", "expected a whole number, got 1000.0 (float); write 1000"),
        ("train.max_steps=1:30", "expected a whole number, got '1:30' (str)"),
        ("train.warmup=3%", "expected a number, got '3%' (str); write 0.03"),
        ("train.warmup='1e-2'", "expected a number, got '1e-2' (str); write 0.01"),
        ("train.warmup='0,5'", "expected a number, got '0,5' (str); write 0.5"),
    ],
)
def test_a_value_of_another_type_is_told_how_to_be_written(tmp_path, assignment, fix):
    assert refusal(write(tmp_path, SMALL), (assignment,)).endswith(f": {fix}")


def test_fields_that_only_hold_anchors(tmp_path):
    rest = yaml.safe_dump({name: value for name, value in SMALL.items() if name != "train"})
    parts = "train:\n  vision_tower: *part\n  connector: {<<: *part, lr: 2e-3}\n  language_model: *part\n"
    path = write(tmp_path, "x-part: &part {train: true, lr: 1e-3}\n" + rest + parts)
    train = load_manifest(path).train
    assert (train.vision_tower.lr, train.connector.lr, train.language_model.lr) == (1e-3, 2e-3, 1e-3)
    assert refusal(path, ("x-part=1",)).startswith("--set x-part=1: x-part: unknown field")
    path.write_text(path.read_text(encoding="utf-8").replace("x-part:", "zz:"), encoding="utf-8")
    assert refusal(path) == f"{path}:1: zz: unknown field; begin the name with `x-` if it only holds anchors"


def test_a_fault_names_the_file_and_line_that_caused_it(tmp_path):
    """Not the file that extends it, and not the file where an override is wrong."""
    write(tmp_path, yaml.safe_dump(SMALL) + "seed: -1\n", "base.yaml")
    path = write(tmp_path, "extends: base.yaml\n\nname: top\n", "top.yaml")
    last = len(yaml.safe_dump(SMALL).splitlines()) + 1
    assert refusal(path).startswith(f"{tmp_path}/base.yaml:{last}: seed: must be at least 0, got -1")
    assert refusal(path, ("name=other",)).startswith(f"{tmp_path}/base.yaml:{last}: seed: ")
    assert refusal(path, ("seed=-2",)).startswith("--set seed=-2: seed: must be at least 0, got -2")
    path = write(tmp_path, {**SMALL, "seed": 3}, "m.yaml")
    assert refusal(path, ("name=x", "frames.max=2")).startswith("--set frames.max=2: frames.min: 4 is larger than max")
    assert refusal(write(tmp_path, "stage: 1\n\x01", "c.yaml")).startswith(
        f"{tmp_path}/c.yaml:2: not valid YAML: contr"
    )


def test_few_files_cannot_extend_each_other_without_end(tmp_path):
    for number in range(8):
        write(tmp_path, {"extends": [f"{number + 1}.yaml"] * 8}, f"{number}.yaml")
    write(tmp_path, SMALL, "8.yaml")
    assert "0.yaml: extends: more than 64 files are read" in refusal(tmp_path / "0.yaml")


def test_extends_merges_mappings_and_replaces_lists(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, SMALL, "base.yaml")
    write(tmp_path, {"extends": "base.yaml", "frames": {"max": 16}}, "middle.yaml")
    over = {"extends": "../middle.yaml", "frames": {"size": 160}, "data": {"entries": [{"annotation": "b.json"}]}}
    manifest = load_manifest(write(tmp_path / "sub", over, "top.yaml"))
    assert (manifest.frames.min, manifest.frames.max, manifest.frames.size) == (4, 16, 160)
    assert [entry.annotation for entry in manifest.data.entries] == ["b.json"]
    assert manifest.name == "top"


def test_extends_overlays_a_list_of_files_in_order(tmp_path):
    """Two branches may share a base; what the later one says wins, and the file itself over both."""
    write(tmp_path, SMALL, "base.yaml")
    write(tmp_path, {"extends": "base.yaml", "frames": {"max": 16, "size": 160}, "seed": 1}, "first.yaml")
    write(tmp_path, {"extends": "base.yaml", "frames": {"size": 192}, "seed": 2}, "second.yaml")
    manifest = load_manifest(write(tmp_path, {"extends": ["first.yaml", "second.yaml"], "seed": 3}, "top.yaml"))
    assert (manifest.frames.max, manifest.frames.size, manifest.seed) == (SMALL["frames"]["max"], 192, 3)
    write(tmp_path, {"frames": {"size": 192}}, "second.yaml")
    manifest = load_manifest(write(tmp_path, {"extends": ["first.yaml", "second.yaml"]}, "top.yaml"))
    assert (manifest.frames.max, manifest.frames.size, manifest.seed) == (16, 192, 1)


def test_extends_of_a_list_that_comes_back_is_refused(tmp_path):
    write(tmp_path, SMALL, "base.yaml")
    write(tmp_path, {"extends": ["base.yaml", "top.yaml"]}, "second.yaml")
    path = write(tmp_path, {"extends": ["base.yaml", "second.yaml"]}, "top.yaml")
    assert "top.yaml: extends: the file extends itself; remove the loop" in refusal(path)


def test_overrides_win_over_the_file_and_come_in_order(tmp_path):
    path = write(tmp_path, SMALL)
    manifest = load_manifest(path, ["train.max_steps=3", "train.max_steps=5", "loader.threads=1"])
    assert (manifest.train.max_steps, manifest.loader.threads) == (5, 1)
    assert load_manifest(path, ["train.max_steps=null"]).train.max_steps is None


@pytest.mark.parametrize("assignment", ["seed", "=3", "seed=[1"])
def test_override_that_is_no_assignment(tmp_path, assignment):
    assert refusal(write(tmp_path, SMALL), (assignment,)).startswith(f"--set {assignment}: expected FIELD.FIELD=VALUE")


def test_override_of_a_field_too_deep_is_refused(tmp_path):
    assert "expected FIELD.FIELD=VALUE" in refusal(write(tmp_path, SMALL), (f"{'a.' * 5000}a=1",))


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_has_two_bounds(tmp_path, name):
    choices, low, high = (NUMBERS[name].metadata.get(key) for key in ("choices", "low", "high"))
    if choices:
        return
    assert low is not None and high is not None and low < high
    path = write(tmp_path, SMALL)
    for wrong in (low - 1 if low else -1e-9, high * 2, ".inf", "-.inf", ".nan", "true", "1" * 400):
        section = {"annotation": "a", "root": "b", "entry": "c"}
        value = nested(name, "WRONG")
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6).replace("WRONG", str(wrong))
        top = name.partition(".")[0].partition("[")[0]
        message = refusal(path, (f"{top}={text[len(top) + 3 : -2]}",))
        assert f"{name}: " in message and re.search("must be at (least|most)|expected a", message), section


@pytest.mark.parametrize("name", PATHS)
def test_every_path_expands_its_variables(tmp_path, monkeypatch, name):
    assert PATHS[name] in ("local", "any"), "say in its spec whether it is a path, or add it to WORDS"
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FS_DISK", "/disk")
    monkeypatch.delenv("FS_NONE", raising=False)
    parents = {"data": {"entries": [{"annotation": "a"}]}, "mix": [{"root": "b"}]}

    def load(text: str) -> str:
        value = copy.deepcopy({**SMALL, **({"mix": parents["mix"]} if name.startswith("mix") else {})})
        place = value
        *sections, last = name.replace("[0]", ".0").split(".")
        for section in sections:
            place = place[int(section)] if section.isdigit() else place.setdefault(section, {})
        place[last] = text
        found = load_manifest(write(tmp_path, value))
        for part in (*sections, last):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    assert load("~/x") == "/home/me/x"
    assert load("$FS_DISK/x") == load("${FS_DISK}/x") == "/disk/x"
    assert load("./~x") == "./~x"
    for text, fault in (("$FS_NONE/x", "FS_NONE"), ("a/${FS_NONE}", "FS_NONE"), ("~nobody-here/x", "~nobody-here")):
        with pytest.raises(ManifestError, match=re.escape(f"{name}: {text}") + f".*{fault}"):
            load(text)
    for address in ("https://host/$a/~b", "hf:owner/name"):
        if PATHS[name] == "any":
            assert load(address) == address
        else:
            with pytest.raises(ManifestError, match=f"{re.escape(name)}: {re.escape(address)} is an address"):
                load(address)


numbers = st.dictionaries(st.sampled_from("ab"), st.integers())
#: fields a and b are numbers, c and d mappings: as in manifests, a field has one kind
mappings = st.recursive(
    numbers, lambda inner: st.builds(dict.__or__, numbers, st.dictionaries(st.sampled_from("cd"), inner)), max_leaves=8
)


@given(mappings, mappings, mappings)
def test_merge_is_associative_and_keeps_its_inputs(a, b, c):
    before = copy.deepcopy((a, b, c))
    assert merge_mappings(merge_mappings(a, b), c) == merge_mappings(a, merge_mappings(b, c))
    assert merge_mappings(a, {}) == merge_mappings({}, a) == a
    assert (a, b, c) == before


@given(mappings, st.lists(st.sampled_from("abcd"), min_size=1, max_size=4), st.integers())
def test_override_sets_exactly_that_field(value, path, number):
    changed = apply_override(value, f"{'.'.join(path)}={number}")
    item = changed
    for name in path:
        item = item[name]
    assert item == number
    assert {name: changed[name] for name in changed if name != path[0]} == {n: value[n] for n in value if n != path[0]}


@given(st.dictionaries(st.text(max_size=8), st.recursive(st.none() | st.integers() | st.text(), st.lists)))
def test_any_mapping_is_refused_in_one_line_and_never_crashes(value):
    with pytest.raises(ManifestError) as caught:
        from_dict(Manifest, value, "m.yaml: ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["demo/stage2", "demo/stage2.yaml", "manifests/demo/stage2.yaml"])
def test_shipped_manifests_are_found_by_name_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    manifest = load_manifest(name)
    assert (manifest.name, manifest.stage, manifest.init_from.run) == ("stage2", 2, "demo/runs/stage1")
    (tmp_path / "own.yaml").write_text(f"extends: {name}\noutput: mine\n", encoding="utf-8")
    assert load_manifest("own.yaml").output == "mine"


def test_own_manifests_win_over_shipped_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stage3.yaml").write_text("extends: demo/stage2\noutput: mine\n", encoding="utf-8")
    assert load_manifest("stage3.yaml").output == "mine"
    with pytest.raises(ManifestError, match=r"^stage9: cannot be read"):
        load_manifest("stage9")
    with pytest.raises(ManifestError, match="^--manifest: https://host/m.yaml is an address"):
        load_manifest("https://host/m.yaml")
    with pytest.raises(ManifestError, match="cannot be read"):
        load_manifest("manifests/../../../../etc/hostname")


def test_extends_is_beside_the_manifest_or_shipped_and_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "basis.yaml").write_text("stage: 1\n", encoding="utf-8")
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "own.yaml").write_text("extends: basis.yaml\n", encoding="utf-8")
    with pytest.raises(ManifestError, match=r"^below/own\.yaml:1: extends: below/basis\.yaml: no such file"):
        load_manifest("below/own.yaml")


@pytest.mark.parametrize("seed", range(8))
def test_damaged_manifests_are_refused_in_one_line(tmp_path, seed):
    """Bits, lines and values of a manifest are changed; it is read, or refused with the name of the file."""
    rng = random.Random(seed)
    sound = yaml.safe_dump(SMALL).encode()
    values = [
        b"null",
        b"-1",
        b"[1]",
        b"{a: b}",
        b".nan",
        b"1e400",
        b"*a",
        b"&a",
        b"<<",
        b'"\\0"',
        b"$X",
        b"~u",
        b"\xff",
    ]
    path = tmp_path / "m.yaml"
    for _ in range(40):
        data = bytearray(sound)
        place, kind = rng.randrange(len(data)), rng.randrange(4)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = data[place : place + rng.randrange(1, 60)] * rng.choice((1, 40))
        else:
            name, colon, _ = (lines := bytes(data).split(b"\n"))[number := rng.randrange(15)].partition(b":")
            lines[number] = name + colon + b" " + rng.choice(values)
            data = bytearray(b"\n".join(lines))
        path.write_bytes(data)
        try:
            load_manifest(path)
        except ManifestError as error:
            assert str(error).startswith(str(path)) and len(str(error).splitlines()) == 1 and len(str(error)) < 500


def test_shards_alone_need_nothing_of_training(tmp_path):
    alone, whole = write(tmp_path, SHARDS_ALONE), write(tmp_path, SMALL, "whole.yaml")
    made, complete = load_build_manifest(alone), load_build_manifest(whole)
    assert type(made) is BuildManifest and type(complete) is Manifest and complete == load_manifest(whole)
    for field in dataclasses.fields(BuildManifest):
        if field.name != "name":
            assert getattr(made, field.name) == getattr(complete, field.name)
    assert made.name == "m" and made.shard_root == complete.shard_root
    fix = "add `output: ...`, `text: ...`, `batching: ...`, `train: ...`, `init_from: ...`"
    assert refusal(alone) == f"{alone}: output: required field is missing; {fix}"


@pytest.mark.parametrize("section", ["output", "text", "batching", "train", "init_from"])
def test_a_part_of_what_training_needs_is_refused(tmp_path, section):
    path = write(tmp_path, {**SHARDS_ALONE, section: SMALL[section]})
    missing = [name for name in ("output", "text", "batching", "train", "init_from") if name != section]
    fix = f"remove it to build shards only, or add {', '.join(missing)}"
    with pytest.raises(ManifestError) as caught:
        load_build_manifest(path)
    assert re.fullmatch(rf"{path}:\d+: {section}: a field of training; {fix}", str(caught.value))


def test_what_makes_a_manifest_one_of_training_is_named(tmp_path):
    needed = "output, text, batching, train, init_from"
    cases: tuple[tuple[dict, tuple[str, ...], str], ...] = (
        (
            {},
            ("seed=1", "loader={threads: 2}"),
            f"^--set loader=.*: loader: a field of training; remove it .* or add {needed}",
        ),
        ({"loader": {}}, (), rf"m\.yaml:\d+: loader: a field of training; remove it .* or add {needed}"),
        ({"mix": [], "output": "out"}, (), "mix: a field of training like output; remove them .* or add text, batch"),
        ({"outptu": "out", "loader": {}}, (), "outptu: unknown field; did you mean `output`"),
        ({"loader": {"threads": -1}}, (), "loader.threads: must be at least"),
    )
    for added, overrides, text in cases:
        path = write(tmp_path, yaml.safe_dump({**SHARDS_ALONE, **added}, sort_keys=False))
        with pytest.raises(ManifestError, match=text) as caught:
            load_build_manifest(path, overrides)
        assert "\n" not in str(caught.value)
    bare = {name: value for name, value in SHARDS_ALONE.items() if name != "stage"}
    with pytest.raises(ManifestError, match="stage: required field is missing; add `stage: ...`, `output: ...`, "):
        load_build_manifest(write(tmp_path, {**bare, "loader": {}}))


def test_shards_at_an_address_are_not_built_there(tmp_path):
    manifest = load_build_manifest(write(tmp_path, SHARDS_ALONE), ("shards=s3://bucket/place",))
    assert manifest.shard_address == "s3://bucket/place/stage2"
    with pytest.raises(ManifestError, match="shards: s3://bucket/place is an address; .* --out FOLDER.* push_shards"):
        manifest.shard_root  # noqa: B018 - the property refuses


def test_a_misspelled_section_of_shards_alone_is_named(tmp_path):
    path = write(tmp_path, {**SHARDS_ALONE, "frame": {}})
    with pytest.raises(ManifestError, match=r"m\.yaml:\d+: frame: unknown field; did you mean `frames`\?"):
        load_build_manifest(path)
