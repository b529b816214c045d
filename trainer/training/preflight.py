"""What can go wrong is found before the first parameter is allocated: all faults at once, one line each.

``check`` compares what every rank sees (manifest, versions, run folder), and sets what the run needs (GPUs, memory,
disk, weights) against what is there. The shards and the tokenizer are checked where the loader opens them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

from framestream.pipeline.config.manifest import Manifest, ManifestError, to_dict
from framestream.pipeline.config.model import TOKENS_PER_CLIP, LanguageModelConfig, ModelConfig
from framestream.pipeline.config.schema import from_dict
from framestream.trainer.checkpoint import disk_usage as disk
from framestream.trainer.checkpoint.save import settings
from framestream.trainer.distributed.launchers import LaunchError
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.model import cost
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.weights import hf_config as release
from framestream.trainer.weights.hub import locate
from framestream.trainer.weights.load import read_config, resolve_init_tensors, weights_place
from framestream.trainer.weights.tensor_files import WeightsError

GIB = 1024**3
TEXT = 256  #: tokens of text beside the largest video, as in the dry run
SEEN_WITHIN = 30.0  #: seconds until a file of rank 0 must be seen by all (file systems of networks keep listings)
PACKAGES = ("torch", "deepspeed", "transformers")
#: fields of the architecture that weights do not depend on
FREE = {"group_clips", "drop_path", "max_position_embeddings"}


def run_preflight(manifest: Manifest, place: DistributedContext, run: Path) -> None:
    """Compare, measure, read the heads of weights; every rank calls this and all leave alike.

    Raises:
        StartError: with every fault, of every rank that has one.
    """
    marker = run / f".seen-{_from_first(uuid.uuid4().hex if place.is_main else None)}"
    there = _from_first(_of_this_rank(manifest) if place.is_main else None)
    faults = [*_differing(there, _of_this_rank(manifest)), *_device(manifest, place)]
    if place.is_main:
        faults += check_weights(manifest)
        faults += (unwritten := list(_mark(marker)))
        faults += filter(None, [] if unwritten else [disk.check_disk(manifest)])
    if _from_first(not unwritten if place.is_main else None) and not _seen(marker):
        shared = "put it on a file system that all machines share"
        faults.append(f"output: {run} is not the folder that rank 0 sees; {shared}")
    hosts = _of_all(socket.gethostname())
    if hosts.index(hosts[place.rank]) == place.rank:  # one rank of each machine
        faults += check_memory(manifest, place.world, hosts.count(hosts[place.rank]), device_bytes(place), host_bytes())
    if place.is_main:
        marker.unlink(missing_ok=True)
    if told := list(_told(_of_all(faults))):
        if place.is_main:
            with contextlib.suppress(OSError):
                run.rmdir()  # empty if it was made here
        raise LaunchError(*told, everywhere=True)


def _told(found: list[list[str]]) -> Iterator[str]:
    """Every fault once, with the ranks that have it, where rank 0 has not."""
    ranks: dict[str, list[int]] = {}
    for rank, faults in enumerate(found):
        for fault in faults:
            ranks.setdefault(fault, []).append(rank)
    for fault, having in ranks.items():
        shown = ", ".join(map(str, having[:4])) + ", ..." * (len(having) > 4)
        yield fault if having[0] == 0 else f"rank{'s' * (len(having) > 1)} {shown}: {fault}"


# ---------------------------------------------------------------------------------------------- what ranks compare


def _of_this_rank(manifest: Manifest) -> dict[str, object]:
    """What must be the same on every rank."""
    return {**settings(manifest), "output": manifest.output, **{name: version(name) for name in PACKAGES}}


def _differing(there: dict[str, object], here: dict[str, object]) -> Iterator[str]:
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            yield f"{name} is {here.get(name)!r}, on rank 0 {there.get(name)!r}; start every rank with the same"


def _device(manifest: Manifest, place: DistributedContext) -> Iterator[str]:
    if place.device.type == "cuda" and manifest.train.dtype == "bf16" and not torch.cuda.is_bf16_supported():
        yield f"train.dtype: {torch.cuda.get_device_name()} has no bf16; set fp32"


def _mark(marker: Path) -> Iterator[str]:
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
    except OSError as error:
        yield f"output: {marker.parent} cannot be written ({error.strerror}); choose another folder"


def _seen(marker: Path) -> bool:
    end = time.monotonic() + SEEN_WITHIN
    while not marker.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def _from_first(value):
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _of_all(value) -> list:
    """Every rank's value, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# --------------------------------------------------------------------------------------------------------- weights


def check_weights(manifest: Manifest) -> list[str]:
    """What is wrong with the places of ``init_from``: absent, damaged, or of another model. Fetches from the hub."""
    try:
        resolve_init_tensors(build_model(manifest, device="meta"), manifest)
        return list(_of_another_model(manifest))
    except (WeightsError, ManifestError) as error:
        return [str(error)]


def _of_another_model(manifest: Manifest) -> Iterator[str]:
    """Differences that shapes do not show, such as heads and ``rope_theta``, where a config.json tells them."""
    for part in ("vision_tower", "language_model"):
        field, place = weights_place(manifest, part)
        folder = None if place == "random" else locate(place)
        if folder is None or not (folder / "config.json").is_file():
            continue
        where = str(folder / "config.json")
        stated = _stated(read_config(folder), part, where)
        wanted = to_dict(getattr(manifest.model, part))
        for name in sorted(stated.keys() - FREE):
            if stated[name] != wanted[name]:
                given = f"{name} is {stated[name]!r}, model.{part}.{name} is {wanted[name]!r}"
                yield f"{field}: {where}: {given}; these are the weights of another model"


def _stated(config: dict, part: str, where: str) -> dict[str, object]:
    """What a config.json says of a part's architecture; empty where it says nothing."""
    if config.get("model_type") == release.OURS:
        return to_dict(getattr(from_dict(ModelConfig, config.get("model"), f"{where}: model"), part))
    if release.is_release(config):
        return to_dict(getattr(release.parse_hf_config(config, where)[0], part))
    rope = config.get("rope_parameters") or {}  # of transformers 5; before, rope_theta stood alone
    known = {name: rope[name] for name in ("rope_theta",) if name in rope} | config
    return {name: known[name] for name in to_dict(LanguageModelConfig()) if name in known and part == "language_model"}


# --------------------------------------------------------------------------------------------------------------- memory


def check_memory(manifest: Manifest, world: int, neighbours: int, device: int | None, host: int) -> list[str]:
    """What certainly does not fit; what probably does not is said on stderr.

    Args:
        world: number of ranks.
        neighbours: ranks on this machine.
        device: bytes of one GPU, None where ranks compute in the machine's own memory.
        host: bytes of the machine's memory.
    """
    frames = manifest.frames.max
    tokens = min(frames // manifest.frames.clip_frames * TOKENS_PER_CLIP + TEXT, manifest.text.max_tokens)
    parts = cost.memory(manifest, frames=frames, tokens=tokens, world=world)
    offloaded = cost.memory(_without_offload(manifest), frames, tokens, world)["states"] - parts["states"]
    limit, where = (host // neighbours, "a rank's share of this machine") if device is None else (device, "the GPU")
    faults = []
    if parts["states"] > limit:
        need = f"weights, gradients and optimiser need {_gib(parts['states'])} a rank, {where} has {_gib(limit)}"
        faults.append(f"memory: {need}; use more ranks, a higher train.zero_stage, or train.offload")
    elif (whole := sum(parts.values())) > limit:
        need = f"about {_gib(whole)} a rank are needed with {frames} frames, {where} has {_gib(limit)}"
        print(f"warning: memory: {need}; fewer model.vision_tower.group_clips or train.offload help", file=sys.stderr)
    if device is not None and offloaded * neighbours > host:
        need = f"train.offload puts {_gib(offloaded * neighbours)} into this machine's memory, which is {_gib(host)}"
        faults.append(f"memory: {need}; use more machines, or offload less")
    return faults


def _without_offload(manifest: Manifest) -> Manifest:
    return dataclasses.replace(manifest, train=dataclasses.replace(manifest.train, offload="none"))


def device_bytes(place: DistributedContext) -> int | None:
    """Memory of this rank's GPU, None on the CPU."""
    return torch.cuda.get_device_properties(place.device).total_memory if place.device.type == "cuda" else None


def host_bytes() -> int:
    """Memory of this machine, or of the control group that this process is confined to."""
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
    stated = [int(text) for path in limits if path.exists() and (text := path.read_text().strip()).isdigit()]
    return min([whole, *stated])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
