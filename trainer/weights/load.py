"""Read and write weights: published files and our own, in one process or under ZeRO-3.

``initialize`` fills a new model from the addresses in the manifest, ``save_weights`` writes a folder,
``load_pretrained`` reads one for inference. Under ZeRO-3 every parameter is gathered by itself: rank 0 reads or writes
it, and no rank stores the full model. :mod:`framestream.trainer.weights.tensor_files` knows the format of the files.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers.initialization import no_init_weights

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import ModelConfig
from framestream.pipeline.config.schema import to_dict
from framestream.pipeline.utils.command_line import printable_line
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import write_record
from framestream.trainer.model.internvideo2 import (
    LAYER_SCALE,
    POS_EMBED_FRAMES,
    init_pos_embed,
    interpolate_pos_embed,
    pos_embed_grid,
)
from framestream.trainer.model.lora import adapted_parts, is_adapter
from framestream.trainer.model.video_llm import VideoLLM
from framestream.trainer.weights.adapters import adapter_folder, write_adapters
from framestream.trainer.weights.base_weights import describe_bases, find_base, merge_stored
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE
from framestream.trainer.weights.hub import locate_weights
from framestream.trainer.weights.runs import RANDOM, parse_model, resolve_init_source
from framestream.trainer.weights.tensor_files import (
    DTYPES,
    SHARD_BYTES,
    LazyTensor,
    WeightsError,
    map_checkpoint_keys,
    shard_files,
    to_hf_name,
    write_shard,
    write_weight_index,
)
from framestream.trainer.weights.tensor_reader import open_tensors, read_config

MAX_NAMES = 3  #: names of faulty tensors in a message
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def open_part_tensors(
    model: VideoLLM, part: str, path: Path, cfg: ModelConfig, add_rows: bool = False
) -> dict[str, LazyTensor]:
    """Open the tensors of one part by our names; all of them exist and have the model's shapes.

    Learned positions for another number of patches or frames are resized to the model's. With ``add_rows``, an
    embedding and a head for fewer token ids get rows for the others, see :func:`_fit_vocabulary`.

    Raises:
        WeightsError: lists missing and unexpected tensors, and tensors of the wrong shape, by name.
    """
    if (base := find_base(path, part)) is not None:
        found = open_part_tensors(model, part, base, cfg, add_rows=True)
        return merge_stored(path, part, found)
    tensors = open_tensors(path)
    found = {name: tensors[key] for key, name in map_checkpoint_keys(part, list(tensors), cfg).items()}
    wanted = {name: full_shape(p) for name, p in model.named_parameters() if name.startswith(part + ".")}
    found |= {name: _fit_positions(name, found[name], size) for name, size in wanted.items() if name in found}
    if add_rows:
        found |= {name: _fit_vocabulary(name, found[name], size) for name, size in wanted.items() if name in found}
    wrong = [
        f"{name} is {list(found[name].shape)}, the model's {list(size)}"
        for name, size in wanted.items()
        if name in found and found[name].shape != size
    ]
    faults = {
        "missing": [name for name in wanted if name not in found],
        "unexpected": [name for name in found if name not in wanted],
        "wrong shape": wrong,
        "not floating-point numbers": [name for name in wanted if name in found and not found[name].is_float],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {_shorten(names)}" for kind, names in faults.items() if names)
        if HEAD in faults["missing"] and EMBEDDING in found:
            tied = "model.language_model.tie_word_embeddings: true"
            listed += f"; a model without {HEAD} shares the weights of the embedding: set {tied}"
        raise WeightsError(f"{path}: does not fit the manifest's {part}: {listed}")
    return merge_stored(path, part, found)


def _fit_vocabulary(name: str, tensor: LazyTensor, size: tuple[int, ...]) -> LazyTensor:
    """Add rows to an embedding or a head with fewer rows than the model's: each is the mean of the file's rows."""
    more = size[0] - tensor.shape[0] if name in (EMBEDDING, HEAD) and len(tensor.shape) == 2 else 0
    if more <= 0 or tensor.shape[0] == 0 or tensor.shape[1] != size[1]:
        return tensor

    def read() -> torch.Tensor:
        rows = tensor.read()
        return torch.cat([rows, rows.float().mean(0, keepdim=True).to(rows.dtype).expand(more, -1)])

    return LazyTensor(size, read, tensor.is_float)


def _fit_positions(name: str, tensor: LazyTensor, size: tuple[int, ...]) -> LazyTensor:
    """Resize learned positions to the model's table; anything else, and a table that does not fit, is unchanged."""
    frames = POS_EMBED_FRAMES.get(name.removeprefix("vision_tower."))
    if frames is None or tensor.shape == size or len(tensor.shape) != 3 or tensor.shape[::2] != size[::2]:
        return tensor
    wanted = pos_embed_grid(size[1], frames)
    if wanted is None or pos_embed_grid(tensor.shape[1], frames) is None:
        return tensor
    return LazyTensor(size, lambda: interpolate_pos_embed(tensor.read(), *wanted), tensor.is_float)


# ------------------------------------------------------------------------------------------------ initialization


def random_tensor(name: str, size: tuple[int, ...], seed: int) -> torch.Tensor:
    """Compute a float32 start value that depends only on the seed, the name and the shape.

    Matrices are normal with variance 1 / inputs (LeCun's rule). That is a standard deviation of 0.017 at 3,584 inputs,
    where Qwen2 has 0.02, and more in smaller models. Norm weights are one, biases zero. InternVideo2's layer scales and
    positions have the published start values.
    """
    frames = POS_EMBED_FRAMES.get(name.removeprefix("vision_tower."))
    if frames is not None and (table := pos_embed_grid(size[1], frames)):
        return init_pos_embed(size[2], *table)
    if name.endswith((".ls1.weight", ".ls2.weight")):
        return torch.full(size, LAYER_SCALE)
    if len(size) == 1:
        return torch.ones(size) if name.endswith(".weight") else torch.zeros(size)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randn(size, generator=generator) * math.prod(size[1:]) ** -0.5


def resolve_init_tensors(
    model: VideoLLM, manifest: Manifest, parts: Collection[str] | None = None
) -> dict[str, LazyTensor]:
    """Find the start value of every parameter of ``parts`` (all if None), as ``manifest.init_from`` says.

    A part named in ``init_from`` takes precedence over ``init_from.run``. A connector that nothing names is random.

    Returns:
        our name -> tensor.

    Raises:
        WeightsError: one line that names the field, the file and the tensors that do not fit.
    """
    tensors: dict[str, LazyTensor] = {}
    paths: dict[str, tuple[str, Path]] = {}
    for part in model.parts() if parts is None else parts:
        field, address = resolve_init_source(manifest, part)
        if address == RANDOM:
            for name, p in model.named_parameters():
                if name.startswith(part + "."):
                    size = full_shape(p)
                    tensors[name] = LazyTensor(size, functools.partial(random_tensor, name, size, manifest.seed))
        else:
            try:
                paths[part] = (f"{field}: ", locate_weights(address))
            except WeightsError as error:
                raise WeightsError(f"{field}: {error}") from error
    return tensors | _open_parts(model, paths, manifest.model, add_rows=True)


def _open_parts(
    model: VideoLLM, paths: dict[str, tuple[str, Path]], cfg: ModelConfig, add_rows: bool = False
) -> dict[str, LazyTensor]:
    """Open the tensors of several parts by our names.

    Args:
        model: with the names and shapes of its parameters.
        paths: part -> beginning of its errors, file or folder.
        cfg: of the model.
        add_rows: see :func:`open_part_tensors`.

    Raises:
        WeightsError: one error with the faults of all parts.
    """
    tensors: dict[str, LazyTensor] = {}
    faults: dict[str, None] = {}  # an ordered set: a damaged folder of all parts is one fault
    for part, (where, path) in paths.items():
        try:
            tensors |= open_part_tensors(model, part, path, cfg, add_rows)
        except WeightsError as error:
            faults[f"{where}{error}"] = None
    if faults:
        raise WeightsError("; ".join(faults))
    return tensors


def _shorten(names: list[str]) -> str:
    """Join the first of ``names`` to a line that is not too long."""
    return ", ".join(map(printable_line, names[:MAX_NAMES])) + (
        f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    )


def initialize(model: VideoLLM, manifest: Manifest) -> None:
    """Set every parameter as ``manifest.init_from`` says. Call before ``deepspeed.initialize``, on every rank.

    Raises:
        WeightsError: on every rank, before any parameter is set.
    """
    partitioned = any(is_partitioned(p) for p in model.parameters())
    reads = not partitioned or dist.get_rank() == 0
    tensors: dict[str, LazyTensor] = {}
    outcome: list[str | None] = [None]
    if reads:
        try:
            tensors = resolve_init_tensors(model, manifest)
        except WeightsError as error:
            outcome = [str(error)]
    if partitioned:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[0] is not None:
        raise WeightsError(outcome[0])
    copy_tensors(model, tensors if reads else None)


def copy_tensors(model: nn.Module, tensors: dict[str, LazyTensor] | None) -> None:
    """Copy ``tensors`` (by our names) into all parameters.

    Every rank calls this, because parameters are gathered; a rank that does not read passes None.
    """
    for name, parameter in model.named_parameters():
        with gather_parameter(parameter, write=True), torch.no_grad():
            if tensors is not None:
                parameter.copy_(tensors[name].read())


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Return whether this rank stores only a ZeRO-3 partition of the parameter."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return the shape of the parameter before ZeRO-3 partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


@contextlib.contextmanager
def gather_parameter(parameter: nn.Parameter, write: bool = False) -> Iterator[None]:
    """Gather a partitioned parameter on every rank inside the block; with ``write``, rank 0's values are stored."""
    if not is_partitioned(parameter):
        yield
        return
    import deepspeed  # only a sharded run needs DeepSpeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if write else None):
        yield


# ------------------------------------------------------------------------------------------------- saving, loading


def save_weights(model: VideoLLM, folder: str | Path, manifest: Manifest, shard_bytes: int = SHARD_BYTES) -> None:
    """Write all parameters by their published names, and config.json. Call on every rank.

    The files are one ``model.safetensors``, or numbered shards of at most ``shard_bytes`` with their index. A larger
    tensor has a shard of its own. config.json is written last, with the manifest's sections that inference needs, and
    the digests of the files.
    """
    folder, writes = Path(folder), not dist.is_initialized() or dist.get_rank() == 0
    tower, base = manifest.model.vision_tower.type, describe_bases(manifest)
    parameters = {
        to_hf_name(name.replace(".base_layer.", "."), tower): p
        for name, p in model.named_parameters()
        if not is_adapter(name) and name.partition(".")[0] not in base
    }
    sizes = {name: _bytes(p) for name, p in parameters.items()}
    digests: dict[str, str] = {}
    if writes:
        folder.mkdir(parents=True, exist_ok=True)
    for file, names in shard_files(sizes, shard_bytes).items() if sizes else ():
        tensors = _gather({name: parameters[name] for name in names}, writes)
        if writes:
            write_shard(folder / file, tensors)
            digests[file] = file_digest(folder / file)
    for part in adapted_parts(manifest.train):
        module = model.parts()[part]
        tensors = _gather({name: p for name, p in module.named_parameters() if is_adapter(name)}, writes)
        if writes:
            address = base[part]["address"] if part in base else ""
            for path in write_adapters(adapter_folder(folder, part), module, tensors, address):
                digests[str(path.relative_to(folder))] = file_digest(path)
    if not writes:
        return
    write_weight_index(folder, sizes, shard_bytes)
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    sections = {name: to_dict(getattr(manifest, name)) for name in ("model", "frames", "images", "text")}
    config = {"architectures": ["VideoLLM"], "model_type": NATIVE_MODEL_TYPE, "dtype": dtype, **sections}
    if base:
        config["base"] = base
    write_record(folder / "config.json", {**config, "digests": digests})


def _gather(parameters: dict[str, nn.Parameter], writes: bool) -> dict[str, torch.Tensor]:
    """Return the values of parameters on the CPU on the rank that writes. Every rank calls this."""
    tensors = {}
    for name, parameter in parameters.items():
        with gather_parameter(parameter):
            if writes:
                tensors[name] = parameter.detach().cpu().contiguous()
    return tensors


def _bytes(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()


def load_pretrained(folder: str | Path, size: int | None = None) -> VideoLLM:
    """Load a model for inference: on the CPU, in eval mode, in the dtype of its config.json.

    Args:
        folder: written by :func:`save_weights` or ``python -m trainer.export``, or a released checkpoint.
        size: pixels of a frame's side; the size in config.json if None.

    Raises:
        WeightsError: there is no config.json, or the weights do not fit it.
        ManifestError: config.json describes a model that cannot be built here.
    """
    folder = Path(folder)
    config, where = read_config(folder), str(folder / "config.json")
    cfg, trained_size, clip_frames = parse_model(config, where)
    shape = (cfg, size or trained_size, clip_frames)
    tensors = open_model_tensors(build_meta_model(*shape), folder, cfg)  # before memory is taken for what does not fit
    with no_init_weights():
        model = VideoLLM(*shape)
    model.to(parse_dtype(config, where))
    copy_tensors(model, tensors)
    return model.eval()


def parse_dtype(config: dict, where: str) -> torch.dtype:
    """Return the dtype in a config.json: ``dtype``, or ``torch_dtype`` as before transformers 5.

    Raises:
        WeightsError: none of :data:`~framestream.trainer.weights.tensor_files.DTYPES`.
    """
    name = config.get("dtype") or config.get("torch_dtype")
    if not isinstance(name, str) or name not in DTYPES:
        raise WeightsError(f"{where}: dtype: {name!r:.40} is not one of {', '.join(DTYPES)}")
    return DTYPES[name]


def build_meta_model(cfg: ModelConfig, size: int, clip_frames: int) -> VideoLLM:
    """Build a model without storage (``meta``), for its parameters' names and shapes."""
    with torch.device("meta"), no_init_weights():
        return VideoLLM(cfg, size, clip_frames)


def open_model_tensors(model: VideoLLM, folder: Path, cfg: ModelConfig) -> dict[str, LazyTensor]:
    """Open the tensors of all parts by our names.

    Raises:
        WeightsError: one error with the faults of all parts, as in :func:`open_part_tensors`.
    """
    return _open_parts(model, {part: ("", folder) for part in model.parts()}, cfg)
