"""Build the DeepSpeed engine of a model: ZeRO-1, 2 or 3, with or without offload."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, Protocol

import torch

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.distributed.process_group import DistributedContext, deepspeed
from framestream.trainer.model.lora import add_adapters, quantize_parts
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.training.deepspeed_config import deepspeed_config, offload_threads
from framestream.trainer.training.optim import freeze, parameter_groups
from framestream.trainer.training.persistent_gather import coalesce_gather
from framestream.trainer.weights.load import initialize
from framestream.trainer.weights.tensor_files import TRAIN_DTYPES


class TrainingEngine(Protocol):
    """The part of DeepSpeed's engine that the training loop uses. DeepSpeed has no types of its own."""

    module: VideoLLM
    optimizer: torch.optim.Optimizer

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Return the loss of a row."""

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Declare whether the next backward pass is the last one before a step."""

    def backward(self, loss: torch.Tensor) -> Any:
        """Accumulate gradients."""

    def step(self) -> Any:
        """Update the weights, unless a gradient is not finite."""

    def was_step_applied(self) -> bool:
        """Whether the last step updated the weights."""

    def get_global_grad_norm(self) -> Any:
        """Return the norm of the last gradient over all ranks, before clipping."""

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage."""


def build_engine(manifest: Manifest, context: DistributedContext) -> tuple[TrainingEngine, VideoLLM]:
    """Build the model with its initial weights, and the DeepSpeed engine that shards it; return both.

    Under ZeRO-3 every parameter is partitioned when it is created, so no rank ever has the complete model in memory.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    gpu = context.device.type != "cpu"
    config = deepspeed_config(manifest, context.world, gpu)
    if gpu and (threads := offload_threads(manifest, os.environ, len(os.sched_getaffinity(0)))):
        torch.set_num_threads(threads)
    partitioned = manifest.train.zero_stage == 3
    # The dtype comes from the config: zero.Init's own dtype argument is misread by DeepSpeed 0.19.
    with deepspeed.zero.Init(config_dict_or_path=config) if partitioned else contextlib.nullcontext():
        model: VideoLLM = build_model(manifest)
    if partitioned:
        _move_buffers(model, context.device)
    else:
        model.to(context.device, TRAIN_DTYPES[manifest.train.dtype])
    initialize(model, manifest)
    quantize_parts(model, manifest.train)
    add_adapters(model, manifest)
    freeze(model.parts(), manifest.train)
    for module in model.leaf_modules():
        deepspeed.utils.set_z3_leaf_module(module, True)
    train = manifest.train
    optimizer = torch.optim.AdamW(
        parameter_groups(model.parts(), train), lr=0.0, betas=(train.beta1, train.beta2), eps=train.epsilon, fused=True
    )
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if partitioned:
        coalesce_gather(engine.optimizer.persistent_parameters)
    return engine, model


def _move_buffers(model: VideoLLM, device: torch.device) -> None:
    """Move all buffers, and keep their dtypes. zero.Init moves the parameters only, and DeepSpeed leaves the rest."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
