"""Sharding from outside: the model and the manifest become a DeepSpeed engine (ZeRO-1, 2 or 3, offload)."""

from __future__ import annotations

import contextlib
import logging

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.distributed.process_group import DistributedContext, deepspeed
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.training.optim import freeze, parameter_groups
from framestream.trainer.weights.load import initialise

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def deepspeed_config(manifest: Manifest, world: int, cuda: bool) -> dict:
    """DeepSpeed's configuration.

    Accumulation stays 1 because the number of micro-steps differs between global batches: the loop scales the loss
    itself and tells the engine where a global batch ends.
    """
    train = manifest.train
    zero: dict = {"stage": train.zero_stage, "contiguous_gradients": True, "overlap_comm": cuda}
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = train.persistence_threshold
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if train.offload == "all" and train.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm,
        "bf16": {"enabled": train.dtype == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def build_engine(manifest: Manifest, place: DistributedContext) -> tuple:
    """Model with its first weights, sharded: returns (DeepSpeed engine, model).

    Under ZeRO-3 every parameter is partitioned as soon as it is made, so no rank ever holds the whole model.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    cuda = place.device.type == "cuda"
    config = deepspeed_config(manifest, place.world, cuda)
    partitioned = manifest.train.zero_stage == 3
    # The dtype comes from the config: zero.Init's own dtype argument is misread by DeepSpeed 0.19.
    with deepspeed.zero.Init(config_dict_or_path=config) if partitioned else contextlib.nullcontext():
        model: VideoLLM = build_model(manifest)
    if not partitioned:
        model.to(place.device, DTYPES[manifest.train.dtype])
    initialise(model, manifest)
    freeze(model.parts(), manifest.train)
    train = manifest.train
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parts(), train), lr=0.0, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=cuda
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine, model
