"""Weights in and out: published files and our own, on one process or under ZeRO-3.

Files carry the published names (``published_name``). ``initialise`` fills a new model from the places that the
manifest names, ``save`` writes a folder, ``load_pretrained`` reads one for inference. Under ZeRO-3 every parameter is
gathered by itself: rank 0 reads or writes it and no rank holds the whole model. Tensors are read with safetensors or
``torch.load(weights_only=True)``; nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.distributed as dist
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.initialization import no_init_weights

from pipeline.manifest import Manifest, Model, plain
from pipeline.schema import build
from trainer import release
from trainer.model.internvideo2 import LAYER_SCALE, TABLES, fit_positions, grid, start_positions
from trainer.model.video_llm import VideoLLM

SHARD_BYTES = 5 * 10**9  #: largest file that ``save`` writes
INDEX = "model.safetensors.index.json"

TOWERS = {  #: published prefix of the vision tower, by its type
    "umt": "model.vision_tower.vision_tower.encoder.",
    "internvideo2": "model.vision_tower.vision_tower.",
}
PUBLISHED = {  #: our prefix -> published prefix of the other parts, once the vision tower's has been tried
    "connector.": "model.mm_projector.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}  #: of weights in files
ENCODER_PREFIXES = (  #: in an encoder's own file; longer ones first
    "vision_tower.vision_tower.encoder.",
    "vision_tower.vision_tower.",
    "vision_tower.encoder.",
    "vision_tower.",
    "vision_encoder.",
    "encoder.",
    "",
)
#: what files of InternVideo2 may hold for its own pretraining, which compares features with other models'
PRETRAINING = ("clip_projector.", "clip_decoder.", "final_clip_decoder.", "clip_pos_embed", "clip_img_pos_embed")


class WeightsError(ValueError):
    """Weights that cannot be read, or that do not fit the model; one line with the file and the names."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape is known, its values are read when wanted."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


# ---------------------------------------------------------------------------------------------------------- names


def published_name(name: str, tower: str = "umt") -> str:
    """Published name of one of our parameters; ``tower`` is the vision tower's type."""
    for ours, published in _prefixes(tower):
        if name.startswith(ours):
            return published + name[len(ours) :]
    raise KeyError(name)


def our_name(name: str, tower: str = "umt") -> str | None:
    """Our name of a tensor with a published name; None for other names."""
    for ours, published in _prefixes(tower):
        if name.startswith(published):
            return ours + name[len(published) :]
    return None


def _prefixes(tower: str) -> list[tuple[str, str]]:
    """(ours, published), the first match being right; any other tower's tensors are a vision tower's too."""
    return [("vision_tower.", TOWERS[tower]), ("vision_tower.", TOWERS["internvideo2"]), *PUBLISHED.items()]


def names_in_file(part: str, keys: list[str], cfg: Model) -> dict[str, str]:
    """Our name for every key of a file that belongs to ``part``; keys that fit nothing keep their own name.

    Accepted are whole models with published names (other parts' tensors are passed over), the encoder's own file
    (any of ``ENCODER_PREFIXES``; UMT's last norm is called ``norm``), ``mm_projector.bin`` (any prefix before
    ``mm_projector.``) and a connector's or encoder's bare names.
    """
    tower = cfg.vision_tower.type
    published = {key: our_name(key, tower) for key in keys}
    if any(name and name.startswith(part + ".") for name in published.values()):
        names = {key: name or key for key, name in published.items() if not name or name.startswith(part + ".")}
    elif part == "connector":
        names = {key: "connector." + key.rpartition("mm_projector.")[2] for key in keys}
    elif part == "vision_tower":
        prefix = next(p for p in ENCODER_PREFIXES if any(key.startswith(p) for key in keys))
        names = {key: key.removeprefix(prefix) for key in keys}
        if tower == "umt":
            names = {key: re.sub(r"^norm\.", "vision_layernorm.", name) for key, name in names.items()}
        names = {key: "vision_tower." + name for key, name in names.items()}
    else:
        names = {key: key for key in keys}
    return {key: name for key, name in names.items() if not name.startswith(_unused(cfg))}


def _unused(cfg: Model) -> tuple[str, ...]:
    """Beginnings of names that files may hold and the model computes, shares or never runs."""
    computed = tuple(TABLES) if cfg.vision_tower.type == "umt" else PRETRAINING
    in_tower = tuple("vision_tower." + name for name in computed)
    last_block = (f"vision_tower.blocks.{cfg.vision_tower.depth - 1}.",)
    tied_head = ("language_model.lm_head.",) if cfg.language_model.tie_word_embeddings else ()
    return in_tower + last_block + tied_head


# -------------------------------------------------------------------------------------------------------- reading


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a file or folder by its own name, unread.

    A folder holds a safetensors index, safetensors files, or one torch file (.bin, .pt, .pth).

    Raises:
        WeightsError: nothing there, a file of another kind, or a damaged one.
    """
    tensors: dict[str, Stored] = {}
    for file in _weight_files(path):
        try:
            tensors.update(_safetensors(file) if file.suffix == ".safetensors" else _torch_file(file))
        except (OSError, RuntimeError, EOFError, ValueError, UnpicklingError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise WeightsError(f"{file}: not a file of tensors that can be read ({reason}); fetch it again") from error
    return tensors


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / INDEX).is_file():
        names = sorted(set(json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        if absent := [name for name in names if not (path / name).is_file()]:
            raise WeightsError(f"{path}: {INDEX} names files that are missing: {', '.join(absent)}")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        files = sorted(file for suffix in ("bin", "pt", "pth") for file in path.glob(f"*.{suffix}"))
        if len(files) > 1:
            raise WeightsError(f"{path}: several weights files; name one of {', '.join(file.name for file in files)}")
    if not files:
        raise WeightsError(f"{path}: no weights here (*.safetensors, *.bin, *.pt, *.pth)")
    return files


def _safetensors(file: Path) -> dict[str, Stored]:
    opened = safe_open(file, framework="pt")
    return {
        key: Stored(tuple(opened.get_slice(key).get_shape()), lambda key=key: opened.get_tensor(key))
        for key in opened.keys()  # noqa: SIM118 (not a mapping)
    }


def _torch_file(file: Path) -> dict[str, Stored]:
    values = torch.load(file, map_location="cpu", weights_only=True)
    for wrapper in ("module", "model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(wrapper), dict):
            values = values[wrapper]
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__} instead of named tensors")
    return {
        key: Stored(tuple(value.shape), lambda value=value: value)
        for key, value in values.items()
        if isinstance(value, torch.Tensor)
    }


def read_part(model: VideoLLM, part: str, path: Path, cfg: Model) -> dict[str, Stored]:
    """The tensors of one part by our names, complete and of the right shapes.

    Learned positions for another number of patches or frames are fitted to the model's.

    Raises:
        WeightsError: lists missing, unexpected and wrongly shaped tensors by name.
    """
    tensors = stored_tensors(path)
    found = {name: tensors[key] for key, name in names_in_file(part, list(tensors), cfg).items()}
    wanted = {name: shape(p) for name, p in model.named_parameters() if name.startswith(part + ".")}
    found = {name: _fitted(name, tensor, wanted[name]) if name in wanted else tensor for name, tensor in found.items()}
    wrong = [
        f"{name} is {list(found[name].shape)}, the model's {list(size)}"
        for name, size in wanted.items()
        if name in found and found[name].shape != size
    ]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "wrong shape": wrong,
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise WeightsError(f"{path}: does not fit the manifest's {part}: {listed}")
    return found


def _fitted(name: str, tensor: Stored, size: tuple[int, ...]) -> Stored:
    """Learned positions as the model wants them; anything else, and a table that cannot be one, as it is."""
    frames = TABLES.get(name.removeprefix("vision_tower."))
    if frames is None or tensor.shape == size or len(tensor.shape) != 3 or tensor.shape[::2] != size[::2]:
        return tensor
    wanted = grid(size[1], frames)
    if wanted is None or grid(tensor.shape[1], frames) is None:
        return tensor
    return Stored(size, lambda: fit_positions(tensor.read(), *wanted))


def locate(place: str) -> Path:
    """Local path of a file, a folder or a hub repository (OWNER/NAME, downloaded once)."""
    path = Path(place)
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
        raise WeightsError(f"{place}: no such file or folder")
    try:
        return Path(snapshot_download(place, allow_patterns=["*.safetensors", "*.json"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise WeightsError(f"{place}: no such file or folder, and no such repository could be fetched") from error


# ------------------------------------------------------------------------------------------------------- filling


def random_tensor(name: str, size: tuple[int, ...], seed: int) -> torch.Tensor:
    """float32 start value that depends on the seed, the name and the shape alone.

    Matrices are normal with variance 1 / inputs (LeCun's rule; a deviation of 0.017 at 3,584 inputs, where Qwen2 has
    0.02, and more in smaller models); norm weights are one, biases zero. InternVideo2's layer scales and positions have
    the published start values.
    """
    frames = TABLES.get(name.removeprefix("vision_tower."))
    if frames is not None and (table := grid(size[1], frames)):
        return start_positions(size[2], *table)
    if name.endswith((".ls1.weight", ".ls2.weight")):
        return torch.full(size, LAYER_SCALE)
    if len(size) == 1:
        return torch.ones(size) if name.endswith(".weight") else torch.zeros(size)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(size, generator=generator) * math.prod(size[1:]) ** -0.5


def sources(model: VideoLLM, manifest: Manifest, parts: Collection[str] | None = None) -> dict[str, Stored]:
    """Where every parameter of ``parts`` (all if None) starts from: our name -> tensor, as ``manifest.init_from`` says.

    A part named in ``init_from`` wins over its ``run``; a connector that nothing names is random.
    """
    given, tensors = manifest.init_from, {}
    for part in model.parts() if parts is None else parts:
        place = getattr(given, part) or (_weights_of(Path(given.run)) if given.run else "random")
        if place == "random":
            for name, p in model.named_parameters():
                if name.startswith(part + "."):
                    size = shape(p)
                    tensors[name] = Stored(size, lambda n=name, s=size: random_tensor(n, s, manifest.seed))
        else:
            try:
                tensors |= read_part(model, part, locate(place), manifest.model)
            except WeightsError as error:
                field = part if getattr(given, part) else "run"
                raise WeightsError(f"init_from.{field}: {error}") from error
    return tensors


def _weights_of(run: Path) -> str:
    """Folder of the weights of a run, or of a released checkpoint: that itself."""
    released = not (run / "final").exists() and (run / "config.json").is_file()
    return str(run if released else run / "final")


def initialise(model: VideoLLM, manifest: Manifest) -> None:
    """Fill every parameter as ``manifest.init_from`` says. Call before ``deepspeed.initialize``, on every rank.

    Raises:
        WeightsError: on every rank alike, before anything is filled.
    """
    partitioned = any(is_partitioned(p) for p in model.parameters())
    reads = not partitioned or dist.get_rank() == 0
    tensors: dict[str, Stored] = {}
    outcome: list[str | None] = [None]
    if reads:
        try:
            tensors = sources(model, manifest)
        except WeightsError as error:
            outcome = [str(error)]
    if partitioned:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise WeightsError(outcome[0])
    fill(model, tensors if reads else None)


def fill(model: nn.Module, tensors: dict[str, Stored] | None) -> None:
    """Copy ``tensors`` (our names) into all parameters; a rank that does not read passes None and takes part."""
    for name, parameter in model.named_parameters():
        with gathered(parameter, write=True), torch.no_grad():
            if tensors is not None:
                parameter.copy_(tensors[name].read())


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 holds only a part of the parameter on this rank."""
    return hasattr(parameter, "ds_id")


def shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def gathered(parameter: nn.Parameter, write: bool = False) -> Iterator[None]:
    """The whole parameter on every rank for a while; with ``write``, rank 0's values are kept."""
    if not is_partitioned(parameter):
        yield
        return
    import deepspeed  # only a sharded run needs it

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


# ------------------------------------------------------------------------------------------------- saving, loading


def save(model: VideoLLM, folder: str | Path, manifest: Manifest, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all parameters under published names, with config.json; call on every rank.

    One ``model.safetensors``, or numbered shards of at most ``shard_bytes`` (a larger tensor has a shard of its own)
    with their index. config.json, written last, holds the manifest's sections that inference needs.
    """
    folder, writes = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    tower = manifest.model.vision_tower.type
    parameters = {published_name(name, tower): p for name, p in model.named_parameters()}
    sizes = {name: _bytes(p) for name, p in parameters.items()}
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for file, names in shard_files(sizes, shard_bytes).items():
        tensors = {}
        for name in names:
            with gathered(parameters[name]):
                if writes:
                    tensors[name] = parameters[name].detach().cpu().contiguous()
        if writes:
            write_shard(folder / file, tensors)
    if not writes:
        return
    write_index(folder, sizes, shard_bytes)
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    sections = {name: plain(getattr(manifest, name)) for name in ("model", "frames", "images", "text")}
    config = {"architectures": ["VideoLLM"], "model_type": release.OURS, "dtype": dtype, **sections}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def _bytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def shard_files(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> its tensors' names, in the order of ``sizes`` (bytes); each file is filled up to ``limit`` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": names for n, names in enumerate(shards, 1)}


def write_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file, readable by whoever may read its folder."""
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors lets only the owner read it


def write_index(folder: Path, sizes: dict[str, int], limit: int) -> None:
    """The index of the files that ``shard_files`` names, where there is more than one."""
    shards = shard_files(sizes, limit)
    if len(shards) > 1:
        located = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": located}
        (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True), encoding="utf-8")


def load_pretrained(folder: str | Path) -> VideoLLM:
    """The model of a folder that ``save`` or ``trainer.export`` wrote, or of a released checkpoint, on the CPU.

    It has the dtype that config.json names.

    Raises:
        WeightsError: no config.json there, or its weights do not fit it.
        ManifestError: config.json describes a model that cannot be built here.
    """
    folder = Path(folder)
    config, where = read_config(folder), str(folder / "config.json")
    if release.is_release(config):
        cfg, size, clip_frames = release.architecture(config, where)
    elif config.get("model_type") == release.OURS:
        cfg = build(Model, config["model"], f"{where}: model")
        size, clip_frames = config["frames"]["size"], config["frames"]["clip_frames"]
    else:
        kind = config.get("model_type")
        raise WeightsError(f"{where}: model_type is {kind!r}, neither framestream's nor a released checkpoint's")
    with no_init_weights():
        model = VideoLLM(cfg, size, clip_frames)
    model.to(dtype_of(config, where))
    fill(model, read_model(model, folder, cfg))
    return model.eval()


def read_config(folder: Path) -> dict:
    """config.json of a folder of weights; WeightsError where it is missing or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise WeightsError(f"{folder}: no config.json; name the `final` folder of a finished run")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{path}: not JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: a {type(config).__name__} instead of an object; fetch it again")
    return config


def dtype_of(config: dict, where: str) -> torch.dtype:
    """dtype that a config.json names (``dtype``, or ``torch_dtype`` as before transformers 5)."""
    name = config.get("dtype") or config.get("torch_dtype")
    if name not in DTYPES:
        raise WeightsError(f"{where}: dtype: {name!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def empty_model(cfg: Model, size: int, clip_frames: int) -> VideoLLM:
    """A model without storage (``meta``), for its parameters' names and shapes."""
    with torch.device("meta"), no_init_weights():
        return VideoLLM(cfg, size, clip_frames)


def read_model(model: VideoLLM, folder: Path, cfg: Model) -> dict[str, Stored]:
    """The tensors of all parts by our names; WeightsError as from ``read_part``."""
    return {name: tensor for part in model.parts() for name, tensor in read_part(model, part, folder, cfg).items()}
