"""``python -m trainer.export --checkpoint C --out DIR``: weights of a run in the layout of the published checkpoints.

    DIR/config.json, generation_config.json
    DIR/model.safetensors                 or shards of at most 5 GB with model.safetensors.index.json
    DIR/tokenizer.json, ...               the files of the run's tokenizer
    DIR/*.py                              of --release-files, if that is given; they are copied, never run

C is a run's folder, its ``final`` folder, or one of its checkpoints (RUN/checkpoints/step-000500, of any number of
ranks), whose parts that do not learn are read from ``init_from`` again. Names, values and dtype are those of the run.
With tied embeddings there is no ``lm_head.weight``, as transformers saves Qwen2: config.json says
``tie_word_embeddings``, and one stored copy cannot disagree with another.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError

from framestream.pipeline.config.manifest import ManifestError, load_manifest
from framestream.pipeline.tokenization.chat_template import load_tokenizer
from framestream.pipeline.utils.atomic_io import fsync_path
from framestream.trainer.model.parts import PARTS
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights import hf_config as release
from framestream.trainer.weights.hf_config import ReleaseConfig
from framestream.trainer.weights.load import parse_dtype, build_meta_model, read_config, open_model_tensors, resolve_init_tensors, full_shape
from framestream.trainer.weights.tensor_files import (
    DTYPES,
    SHARD_BYTES,
    LazyTensor,
    WeightsError,
    shard_files,
    to_hf_name,
    write_index,
    write_shard,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


class ExportError(ValueError):
    """An export that cannot be made; one line that names the file or folder and the fix."""


def export(
    checkpoint: Path, out: Path, release_files: Path | None = None, shard_bytes: int = SHARD_BYTES
) -> ReleaseConfig:
    """Write ``checkpoint`` to the folder ``out``, which appears whole or not at all; returns what was exported.

    No more than one shard is held in memory.

    Raises:
        ExportError, WeightsError, ManifestError: one line each; nothing is written.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise ExportError(f"{out}: is there already and not an empty folder; name another --out or remove it")
    code = python_files(release_files) if release_files else []
    settings, tensors = open_checkpoint(checkpoint)
    part = out.absolute().with_name(f".{out.absolute().name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        tokens = _write_tokenizer(part, settings.text.tokenizer)
        _write_weights(part, tensors, settings, shard_bytes)
        for path in code:
            shutil.copyfile(path, part / path.name)
        _write_json(part / "generation_config.json", release.build_generation_config(tokens))
        _write_json(part / "config.json", release.build_hf_config(settings, tokens))
        for path in (*part.iterdir(), part):
            fsync_path(path)
        os.replace(part, out)
        fsync_path(part.parent)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return settings


def python_files(folder: Path) -> list[Path]:
    """The release's python files in ``folder``; links are passed over, so that only what lies there is copied.

    Raises:
        ExportError: the file that config.json's ``auto_map`` names is not among them.
    """
    found = sorted(path for path in folder.glob("*.py") if path.is_file() and not path.is_symlink())
    if f"{release.CODE}.py" not in [path.name for path in found]:
        fix = "name a folder with the release's python files themselves, not links to them"
        raise ExportError(f"{folder}: no {release.CODE}.py there; {fix}")
    return found


# -------------------------------------------------------------------------------------------------------- reading


def open_checkpoint(folder: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor]]:
    """Settings and tensors, by our names and not yet read, of a run, its final weights or one of its checkpoints."""
    if (folder / "final" / "config.json").is_file():
        return _final(folder / "final")
    if (folder / "config.json").is_file():
        return _final(folder)
    if (folder / "state.json").is_file():
        return _unfinished(folder, folder.resolve().parent.parent)
    if (folder / "checkpoints" / "latest").is_file():
        return _unfinished(None, folder)
    raise ExportError(f"{folder}: no weights there; name a RUN, its RUN/final or one of its RUN/checkpoints/step-*")


def _final(folder: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor]]:
    config, where = read_config(folder), str(folder / "config.json")
    if config.get("model_type") != release.NATIVE_MODEL_TYPE:
        raise ExportError(f"{where}: model_type is {config.get('model_type')!r}; name the `final` folder of a run")
    settings = ReleaseConfig.of(config, _name(parse_dtype(config, where)), where)
    model = build_meta_model(settings.model, settings.frames.size, settings.frames.clip_frames)
    tensors = open_model_tensors(model, folder, settings.model)
    return settings, {name: tensors[name] for name, _ in model.named_parameters()}


def _unfinished(folder: Path | None, run: Path) -> tuple[ReleaseConfig, dict[str, LazyTensor]]:
    """From DeepSpeed's files (the newest checkpoint if None): float32 weights of the optimiser in the run's dtype."""
    from framestream.trainer.checkpoint import load as resume  # brings DeepSpeed along, which final weights do not need
    from framestream.trainer.checkpoint import (
        save as checkpoint,  # brings DeepSpeed along, which final weights do not need
    )
    from framestream.trainer.training.engine import DTYPES as TRAINED_IN

    manifest = load_manifest(run / "manifest.yaml")
    model = build_model(manifest, device="meta")
    wanted = {name: full_shape(p) for name, p in model.named_parameters()}
    try:
        folder = folder or checkpoint.latest_checkpoint(run)
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        checkpoint.check_settings(state["settings"], manifest, folder)
        tensors = resume.trained_weights(folder)
    except checkpoint.CheckpointError as error:
        raise WeightsError(str(error)) from error
    except (OSError, ValueError, KeyError) as error:
        raise WeightsError(f"{folder / 'state.json'}: cannot be read; take another checkpoint of the run") from error
    frozen = [part for part in PARTS if not getattr(manifest.train, part).train]
    tensors |= resolve_init_tensors(model, manifest, frozen)
    wrong = [name for name, size in wanted.items() if name not in tensors or tensors[name].shape != size]
    if wrong:
        raise WeightsError(f"{folder}: missing, or not as {run / 'manifest.yaml'} says: {', '.join(wrong)}")
    dtype = _name(TRAINED_IN[manifest.train.dtype])
    settings = ReleaseConfig(manifest.model, manifest.frames, manifest.images, manifest.text, dtype)
    return settings, {name: tensors[name] for name in wanted}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------- writing


def _write_weights(folder: Path, tensors: dict[str, LazyTensor], settings: ReleaseConfig, limit: int) -> None:
    kind, tower = DTYPES[settings.dtype], settings.model.vision_tower.type
    stored = {to_hf_name(name, tower): tensor for name, tensor in tensors.items()}
    sizes = {name: math.prod(tensor.shape) * kind.itemsize for name, tensor in stored.items()}
    for file, names in shard_files(sizes, limit).items():
        write_shard(folder / file, {name: stored[name].read().to(kind).contiguous() for name in names})
    write_index(folder, sizes, limit)


def _write_tokenizer(folder: Path, name: str) -> dict[str, int]:
    """Copy the tokenizer's files as they are; returns its bos, eos and pad ids (Qwen2's bos is its padding)."""
    tokenizer = load_tokenizer(name)
    source = Path(name) if Path(name).is_dir() else Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    for file in TOKENIZER_FILES:
        if (source / file).is_file():
            shutil.copyfile(source / file, folder / file)
    if not (folder / "tokenizer.json").exists():  # made by transformers out of vocab.json and merges.txt
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    pad, bos = tokenizer.pad_token_id, tokenizer.bos_token_id
    ids = {
        "bos_token_id": pad if bos is None else bos,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": pad,
    }
    return {name: number for name, number in ids.items() if number is not None}


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.export") -> int:
    """Command line; returns the exit status (0 done, 1 weights that cannot be read, 2 bad input)."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="RUN, RUN/final or RUN/checkpoints/step-N")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--release-files", type=Path, metavar="DIR", help="copy the release's python files from here")
    options = parser.parse_args(arguments)
    try:
        settings = export(options.checkpoint, options.out, options.release_files)
    except (ExportError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.checkpoint}: exported to {options.out}")
    if found := release.describe_tower_mismatch(settings):
        print(f"note: the release's own code builds another tower ({found}); only framestream reads this one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
