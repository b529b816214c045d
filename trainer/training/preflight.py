"""Check what a run needs before the first parameter is allocated, and report all faults at once, one line each.

:func:`run_preflight` compares what all ranks see: manifest, versions and run folder. It also checks GPUs, memory, disk
and weights. The loader checks the shards and the tokenizer when it opens them.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch

import framestream
from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.config.model import LanguageModelConfig, ModelConfig
from framestream.pipeline.config.schema import drop_former_fields, from_dict, to_dict
from framestream.pipeline.utils.differences import describe_changes
from framestream.pipeline.utils.digests import bytes_digest
from framestream.trainer.checkpoint.disk_usage import check_disk
from framestream.trainer.checkpoint.save import checkpoint_settings
from framestream.trainer.distributed.launchers import LaunchError
from framestream.trainer.distributed.process_group import DistributedContext, broadcast_object, gather_objects
from framestream.trainer.model.lora import adapted_parts, check_adapters
from framestream.trainer.model.quantization import FULL, describe_unusable
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.monitoring.trackers import missing_trackers
from framestream.trainer.training.memory_plan import (
    check_memory,
    device_bytes,
    host_bytes,
    resolve_recomputation,
)
from framestream.trainer.weights.architecture_checks import describe_unsupported, log_unknown_fields
from framestream.trainer.weights.hf_config import NATIVE_MODEL_TYPE, is_hf_release, parse_hf_config
from framestream.trainer.weights.hub import locate_weights
from framestream.trainer.weights.load import resolve_init_tensors
from framestream.trainer.weights.runs import RANDOM, resolve_init_source
from framestream.trainer.weights.tensor_files import WeightsError
from framestream.trainer.weights.tensor_reader import read_config

MARKER_TIMEOUT = 30.0  #: seconds until all ranks must see a file of rank 0; network file systems cache listings
PACKAGES = ("torch", "deepspeed", "transformers")
CODE = ("pipeline", "trainer")  #: packages of this project that a run uses
#: architecture fields that do not affect the weights
WEIGHT_NEUTRAL_FIELDS = {"group_tokens", "drop_path", "max_position_embeddings"}

logger = logging.getLogger(__name__)


def run_preflight(manifest: Manifest, context: DistributedContext, run: Path) -> Manifest:
    """Run all checks. Every rank calls this, and all ranks raise the same error.

    Returns:
        the manifest, with ``train.gradient_checkpointing: auto`` replaced by what fits into memory.

    Raises:
        LaunchError: every fault, with the ranks that have it.
    """
    marker = run / f".seen-{broadcast_object(uuid.uuid4().hex if context.is_main else None, context)}"
    own = _shared_values(manifest)
    faults = [*_differences(broadcast_object(own, context), own), *_check_device(manifest, context)]
    writable = False
    if context.is_main:
        faults += [*missing_trackers(manifest.train.trackers), *check_weights(manifest)]
        unwritable = list(_write_marker(marker))
        faults += unwritable
        writable = not unwritable
        faults += filter(None, [check_disk(manifest)] if writable else [])
    if broadcast_object(writable, context) and not _wait_for(marker):
        shared = "put it on a file system that all machines share"
        faults.append(f"output: {run} is not the folder that rank 0 sees; {shared}")
    hosts = gather_objects(socket.gethostname(), context)
    ranks = hosts.count(hosts[context.rank])
    manifest = resolve_recomputation(manifest, context, ranks)
    if hosts.index(hosts[context.rank]) == context.rank:  # one rank of each machine
        faults += check_memory(manifest, context.world, ranks, device_bytes(context), host_bytes())
    if context.is_main:
        marker.unlink(missing_ok=True)
    if merged := list(_merge(gather_objects(faults, context))):
        if context.is_main:
            with contextlib.suppress(OSError):
                run.rmdir()  # fails unless it is empty, as when it was created here
        raise LaunchError(*merged, everywhere=True)
    return manifest


def _merge(faults_by_rank: list[list[str]]) -> Iterator[str]:
    """Yield every fault once. Faults that rank 0 does not have are prefixed with their ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, faults in enumerate(faults_by_rank):
        for fault in faults:
            ranks.setdefault(fault, []).append(rank)
    for fault, affected in ranks.items():
        shown = ", ".join(map(str, affected[:4])) + ", ..." * (len(affected) > 4)
        yield fault if affected[0] == 0 else f"rank{'s' * (len(affected) > 1)} {shown}: {fault}"


# ---------------------------------------------------------------------------------------------- comparison of ranks


def _shared_values(manifest: Manifest) -> dict[str, object]:
    """Return the values that must be equal on every rank."""
    versions = {name: version(name) for name in PACKAGES}
    # these may change when a run is resumed, and decide which calls ranks make together
    fields = ("gradient_checkpointing", "save_every", "max_not_finite", "check_calls")
    calls = {f"train.{name}": getattr(manifest.train, name) for name in fields}
    calls |= {f"evaluate.{name}": value for name, value in to_dict(manifest.evaluate).items()}
    return {**checkpoint_settings(manifest), **calls, "output": manifest.output, **versions, "code": code_digest()}


def code_digest() -> str:
    """Return a digest of the project's own code, which differs where a machine has another version of it."""
    package = Path(framestream.__file__).parent
    files = sorted(path for name in CODE for path in (package / name).resolve().rglob("*.py"))
    return bytes_digest(b"".join(path.read_bytes() for path in files))


def compare_shards(fingerprint: dict[str, object], context: DistributedContext) -> None:
    """Check that every rank has opened the same shards. Every rank calls this, and all ranks raise the same error.

    Args:
        fingerprint: of the loader: what decides the order and the contents of global batches.

    Raises:
        LaunchError: what differs, with the ranks that have it.
    """
    expected = broadcast_object(fingerprint, context)
    faults = [f"shards: {fault}" for fault in _differences(expected, fingerprint)]
    if merged := list(_merge(gather_objects(faults, context))):
        raise LaunchError(*merged, everywhere=True)


def _differences(expected: dict[str, object], actual: dict[str, object]) -> Iterator[str]:
    for name in sorted(expected.keys() | actual.keys()):
        if expected.get(name) != actual.get(name):
            values = describe_changes({name: expected.get(name)}, {name: actual.get(name)}, ("rank 0", "here"))
            yield f"{values}; start every rank with the same"


def _check_device(manifest: Manifest, context: DistributedContext) -> Iterator[str]:
    if context.device.type == "cuda" and manifest.train.dtype == "bf16" and not torch.cuda.is_bf16_supported():
        yield f"train.dtype: {torch.cuda.get_device_name()} does not support bf16; set fp32"
    for part, settings in adapted_parts(manifest.train).items():
        if settings.load != FULL and (fault := describe_unusable(settings.load, context.device)):
            yield f"train.{part}.lora.load: {fault}"


def _write_marker(marker: Path) -> Iterator[str]:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        yield f"output: {marker.parent} cannot be written ({error.strerror}); choose another folder"


def _wait_for(marker: Path) -> bool:
    end = time.monotonic() + MARKER_TIMEOUT
    while not marker.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


# --------------------------------------------------------------------------------------------------------- weights


def check_weights(manifest: Manifest) -> list[str]:
    """Return the faults of the weights that ``init_from`` names: missing, damaged, or of another model.

    Weights on the hub are downloaded.
    """
    try:
        model = build_model(manifest, device="meta")
        check_adapters(model, manifest.train)
        _check_quantized(manifest)
        resolve_init_tensors(model, manifest)
        return list(_architecture_differences(manifest))
    except (WeightsError, ManifestError) as error:
        return [str(error)]


def _check_quantized(manifest: Manifest) -> None:
    """Check that weights in 4 or 8 bits come from files: the final weights of a run do not repeat them.

    Raises:
        ManifestError: they are random.
    """
    for part, settings in adapted_parts(manifest.train).items():
        if settings.load != FULL and resolve_init_source(manifest, part)[1] == RANDOM:
            fault = f"{settings.load} is for stored weights, not random ones"
            raise ManifestError(
                f"train.{part}.lora.load: {fault}; name weights in init_from.{part}, or set it to {FULL}"
            )


def _architecture_differences(manifest: Manifest) -> Iterator[str]:
    """Yield differences to config.json that tensor shapes do not show, such as heads and ``rope_theta``."""
    for part in ("vision_tower", "language_model"):
        field, address = resolve_init_source(manifest, part)
        folder = None if address == RANDOM else locate_weights(address)
        if folder is None or not (folder / "config.json").is_file():
            continue
        where, config = str(folder / "config.json"), read_config(folder)
        if part == "language_model" and config.get("model_type") != NATIVE_MODEL_TYPE and not is_hf_release(config):
            for fault in describe_unsupported(config):
                yield f"{field}: {where}: {fault}; this is another model than the Qwen2 that is computed here"
            log_unknown_fields(folder / "config.json", config)
        stored = _stored_architecture(config, part, where)
        wanted = to_dict(getattr(manifest.model, part))
        for name in sorted(stored.keys() - WEIGHT_NEUTRAL_FIELDS):
            if name == "vocab_size" and isinstance(stored[name], int) and stored[name] < wanted[name]:
                rows = f"{wanted[name] - stored[name]:,} rows are added to the embedding's {stored[name]:,}"
                logger.warning("%s: model.%s.vocab_size: %s; each is their mean", field, part, rows)
            elif stored[name] != wanted[name]:
                difference = f"{name} is {stored[name]!r:.60}, model.{part}.{name} is {wanted[name]!r}"
                yield f"{field}: {where}: {difference}; these are the weights of another model"


def _stored_architecture(config: dict, part: str, where: str) -> dict[str, object]:
    """Return the architecture of a part according to config.json; empty if it has none."""
    if config.get("model_type") == NATIVE_MODEL_TYPE:
        stored = drop_former_fields(ModelConfig, config.get("model"))
        return to_dict(getattr(from_dict(ModelConfig, stored, f"{where}: model"), part))
    if is_hf_release(config):
        return to_dict(getattr(parse_hf_config(config, where)[0], part))
    rope = config.get("rope_parameters")
    rope = rope if isinstance(rope, dict) else {}  # transformers 5; earlier versions have rope_theta at the top level
    known = {name: rope[name] for name in ("rope_theta",) if name in rope} | config
    return {name: known[name] for name in to_dict(LanguageModelConfig()) if name in known and part == "language_model"}
