"""Export the weights of a run in the layout of the published checkpoints.

    OUT/config.json, generation_config.json
    OUT/model.safetensors                 or shards of at most 5 GB with model.safetensors.index.json
    OUT/tokenizer.json, ...               the files of the run's tokenizer
    OUT/*.py                              copied from the release, never run; or with ``self_contained`` our own
    OUT/processor_config.json             with ``self_contained``: how videos and images become inputs
    OUT/chat_template.jinja               with ``self_contained``: the template of training
    OUT/README.md                         the model card

Names, values and dtype are those of the run. With tied embeddings there is no ``lm_head.weight``, as transformers saves
Qwen2: config.json says ``tie_word_embeddings``, and a second copy could differ from the first.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from framestream.pipeline.config.manifest import load_manifest
from framestream.pipeline.config.preprocessing import TextConfig
from framestream.pipeline.tokenization.chat_template import ChatTemplate
from framestream.pipeline.tokenization.tokenizer_files import TOKENIZER_FILES
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.trainer.checkpoint.model_card import MODEL_CARD_FILE, render_model_card
from framestream.trainer.checkpoint.released import is_released, open_released
from framestream.trainer.checkpoint.training_history import find_history
from framestream.trainer.model.lora import adapted_parts
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.standalone.export_files import write_standalone_files
from framestream.trainer.weights.adapters import adapter_folder, merge_adapters, split_adapters
from framestream.trainer.weights.hf_config import (
    HF_CODE_MODULE,
    NATIVE_MODEL_TYPE,
    ReleaseConfig,
    build_generation_config,
    build_hf_config,
)
from framestream.trainer.weights.load import (
    build_meta_model,
    full_shape,
    open_model_tensors,
    parse_dtype,
    resolve_init_tensors,
)
from framestream.trainer.weights.runs import describe_steps, is_pointer, locate_path, locate_paths
from framestream.trainer.weights.tensor_files import (
    DTYPES,
    SHARD_BYTES,
    TRAIN_DTYPES,
    LazyTensor,
    WeightsError,
    shard_files,
    to_hf_name,
    write_shard,
    write_weight_index,
)
from framestream.trainer.weights.tensor_reader import read_config


class ExportError(ValueError):
    """An export that is not possible; one line that names the file or folder and the fix."""


def export(
    checkpoint: Path,
    out: Path,
    release_files: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    self_contained: bool = False,
    merge: bool = False,
) -> ReleaseConfig:
    """Write ``checkpoint`` to the folder ``out``, which appears complete or not at all.

    At most one shard is in memory at a time.

    Args:
        checkpoint: a run's folder, its ``final`` folder, or one of its checkpoints of any number of ranks, also by the
            file ``best`` or ``latest`` that names it. Parts that are frozen are in no checkpoint; they are read from
            ``init_from`` again. With ``self_contained`` also a published checkpoint, or an export.
        out: folder to create.
        release_files: folder with the release's Python files, which are copied.
        shard_bytes: largest file.
        self_contained: write code and settings with which transformers loads the folder and reads media files.
        merge: merge adapters into the weights, as peft does. A run with adapters is exported in no other way.

    Returns:
        what was exported.

    Raises:
        ExportError, WeightsError, ManifestError: one line each; nothing is written.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ExportError(f"{out}: is there already and not an empty folder; name another --out or remove it")
    code = python_files(release_files) if release_files else []
    if is_pointer(checkpoint):
        checkpoint = _follow_pointer(checkpoint)
    of_a_run = True
    if self_contained and is_released(checkpoint):
        settings, tensors, of_a_run = open_released(checkpoint)
    else:
        settings, tensors = open_checkpoint(checkpoint)
    if has_adapters(checkpoint) != merge:
        folders = [path for path in (checkpoint / "final" / "adapters", checkpoint / "adapters") if path.is_dir()]
        kept = f" (in peft's layout in {folders[0]})" if folders else ""
        fix = "it has no adapters; drop --merge" if merge else f"it has adapters{kept}; add --merge"
        raise ExportError(f"{checkpoint}: {fix}")
    part = out.absolute().with_name(f".{out.absolute().name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        tokens, ends = _write_tokenizer(part, settings.text)
        _write_weights(part, tensors, settings, shard_bytes)
        for path in code:
            shutil.copyfile(path, part / path.name)
        _write_json(part / "generation_config.json", build_generation_config(tokens, ends))
        config, history = build_hf_config(settings, tokens), find_history(checkpoint)
        config[NATIVE_MODEL_TYPE] |= history.to_section()
        if self_contained:
            limit = settings.model.language_model.max_position_embeddings
            sections = (settings.frames, settings.images, settings.text)
            config |= write_standalone_files(part, *sections, limit, compressed=of_a_run)
        _write_json(part / "config.json", config)
        card = render_model_card(settings, history, self_contained)
        (part / MODEL_CARD_FILE).write_text(card, encoding="utf-8")
        for path in (*part.iterdir(), part):
            fsync_path(path)
        os.replace(part, out)
        fsync_path(part.parent)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return settings


def has_adapters(checkpoint: Path) -> bool:
    """Return whether a run, its final weights or one of its checkpoints has adapters."""
    for folder in (checkpoint / "final", checkpoint):
        if (folder / "config.json").is_file():
            return any(adapter_folder(folder, part).is_dir() for part in PARTS)
    run = checkpoint if (checkpoint / "manifest.yaml").is_file() else checkpoint.resolve().parent.parent
    return bool(adapted_parts(load_manifest(run / "manifest.yaml", stored=True).train))


def python_files(folder: Path) -> list[Path]:
    """List the release's Python files in ``folder``. Links are ignored, so that only files of this folder are copied.

    Raises:
        ExportError: the file that config.json's ``auto_map`` names is not among them.
    """
    found = sorted(path for path in folder.glob("*.py") if path.is_file() and not path.is_symlink())
    if f"{HF_CODE_MODULE}.py" not in [path.name for path in found]:
        fix = "name a folder with the release's python files themselves, not links to them"
        raise ExportError(f"{folder}: no {HF_CODE_MODULE}.py there; {fix}")
    return found


# -------------------------------------------------------------------------------------------------------- reading


def open_checkpoint(folder: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor]]:
    """Open a run, its final weights or one of its checkpoints.

    Returns:
        its settings, and its tensors by our names, not yet read.

    Raises:
        ExportError, WeightsError, ManifestError: one line each.
    """
    if (folder / "final" / "config.json").is_file():
        return _open_final(folder / "final")
    if (folder / "config.json").is_file():
        return _open_final(folder)
    if (folder / "state.json").is_file():
        return _open_unfinished(folder, folder.resolve().parent.parent)
    if (folder / "checkpoints" / "latest").is_file():
        return _open_unfinished(None, folder)
    fix = describe_steps(folder) or "no weights there; name a RUN, its RUN/final or one of its RUN/checkpoints/step-*"
    raise ExportError(f"{folder}: {fix}")


def _follow_pointer(pointer: Path) -> Path:
    """Return the checkpoint that RUN/checkpoints/best or latest names."""
    from framestream.trainer.checkpoint.state import CheckpointError, named_checkpoint

    fix = f"name one of {pointer.parent}/step-*"
    try:
        checkpoint = named_checkpoint(pointer, fix, fix)
    except CheckpointError as error:
        raise WeightsError(str(error)) from None
    if checkpoint is None:
        raise ExportError(f"{pointer}: is gone; {fix}")
    return checkpoint


def _open_final(folder: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor]]:
    """Open final weights, as ``save_weights`` wrote them."""
    config, where = read_config(folder), str(folder / "config.json")
    if config.get("model_type") != NATIVE_MODEL_TYPE:
        fix = "name the `final` folder of a run, or convert a published checkpoint with --self-contained"
        raise ExportError(f"{where}: model_type is {config.get('model_type')!r}; {fix}")
    settings = ReleaseConfig.from_config(config, _dtype_name(parse_dtype(config, where)), where)
    tokenizer = locate_path(settings.text.tokenizer, folder / "config.json")
    settings = dataclasses.replace(settings, text=dataclasses.replace(settings.text, tokenizer=tokenizer))
    model = build_meta_model(settings.model, settings.frames.size, settings.frames.clip_frames)
    tensors = open_model_tensors(model, folder, settings.model)
    return settings, {name: tensors[name] for name, _ in model.named_parameters()}


def _open_unfinished(folder: Path | None, run: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor]]:
    """Open a checkpoint of DeepSpeed (the newest if None): the optimizer's float32 weights, in the run's dtype."""
    # these import DeepSpeed, which final weights do not need
    from framestream.trainer.checkpoint.load import trained_weights
    from framestream.trainer.checkpoint.save import check_settings
    from framestream.trainer.checkpoint.state import (
        CheckpointError,
        check_files,
        describe_fix,
        latest_checkpoint,
        read_state,
    )

    manifest = locate_paths(load_manifest(run / "manifest.yaml", stored=True), run / "manifest.yaml")
    model = build_model(manifest, device="meta")
    shapes = {name: full_shape(p) for name, p in model.named_parameters()}
    try:
        checkpoint = folder or latest_checkpoint(run)
        if checkpoint is None:
            raise ExportError(f"{run}: has no checkpoint; name another RUN")
        state = read_state(checkpoint)
        check_settings(state["settings"], manifest, checkpoint)
        if fault := check_files(checkpoint, state):
            raise CheckpointError(f"{fault}; {describe_fix(checkpoint)}")
        tensors = trained_weights(checkpoint)
    except CheckpointError as error:
        raise WeightsError(str(error)) from error
    adapted = adapted_parts(manifest.train)
    kept = [part for part in PARTS if part in adapted or not getattr(manifest.train, part).train]
    start = resolve_init_tensors(model, manifest, kept)
    for part, lora in adapted.items():
        start = merge_adapters(start, part, split_adapters(tensors, part, lora.alpha), checkpoint)
    tensors |= start
    wrong = [name for name, shape in shapes.items() if name not in tensors or tensors[name].shape != shape]
    if wrong:
        manifest_file = run / "manifest.yaml"
        raise WeightsError(f"{checkpoint}: tensors missing, or not as in {manifest_file}: {', '.join(wrong)}")
    dtype = _dtype_name(TRAIN_DTYPES[manifest.train.dtype])
    settings = ReleaseConfig(manifest.model, manifest.frames, manifest.images, manifest.text, dtype)
    return settings, {name: tensors[name] for name in shapes}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------- writing


def _write_weights(folder: Path, tensors: dict[str, LazyTensor], settings: ReleaseConfig, limit: int) -> None:
    """Write all tensors by their published names, in files of at most ``limit`` bytes."""
    dtype, tower = DTYPES[settings.dtype], settings.model.vision_tower.type
    by_name = {to_hf_name(name, tower): tensor for name, tensor in tensors.items()}
    sizes = {name: math.prod(tensor.shape) * dtype.itemsize for name, tensor in by_name.items()}
    for file, names in shard_files(sizes, limit).items():
        write_shard(folder / file, {name: by_name[name].read().to(dtype).contiguous() for name in names})
    write_weight_index(folder, sizes, limit)


def _write_tokenizer(folder: Path, text: TextConfig) -> tuple[dict[str, int], tuple[int, ...]]:
    """Copy the tokenizer's files unchanged.

    Returns:
        its bos, eos and pad ids (Qwen2's bos is its padding), and the ids that end an answer. Where it has no eos, the
        first of these is taken.
    """
    template, name = ChatTemplate(text), text.tokenizer
    tokenizer = template.tokenizer
    source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    if not (folder / "tokenizer.json").exists():  # transformers has built it from vocab.json and merges.txt
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos, eos = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = template.end_ids
    ids = {
        "bos_token_id": pad if bos is None else bos,
        "eos_token_id": ends[0] if eos is None and ends else eos,
        "pad_token_id": pad,
    }
    return {name: number for name, number in ids.items() if number is not None}, ends


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
