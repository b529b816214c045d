"""DeepSpeed's configuration of a run: ZeRO stage, offload, data types, and buffers that fit the model.

Gradients of micro-steps are added in float32 from ZeRO-2 on, also where weights are bf16. Each micro-step's gradient is
computed, and averaged over ranks, in the dtype of the weights. ZeRO-1 keeps complete gradients on every rank and adds
them in the dtype of the weights: in float32 they would need 4 bytes for each trained parameter, not divided by ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

from framestream.pipeline.config.manifest import Manifest
from framestream.trainer.model.cost import largest_layer

#: Elements of the buckets of a small model: all of its gradients, 16 MiB in float32, are reduced in few collectives.
MIN_BUCKET = 2**22


def deepspeed_config(manifest: Manifest, world: int, cuda: bool) -> dict:
    """Return DeepSpeed's configuration.

    Gradient accumulation stays 1, because the number of micro-steps differs between global batches. The loop scales
    the loss itself and tells the engine where a global batch ends.
    """
    train = manifest.train
    bucket = max(largest_layer(manifest), MIN_BUCKET)
    zero: dict = {
        "stage": train.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": cuda,
        "reduce_bucket_size": bucket,
    }
    if train.zero_stage == 3:
        zero["stage3_param_persistence_threshold"] = train.persistence_threshold
        zero["stage3_prefetch_bucket_size"] = bucket
    if train.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
    if train.offload == "all" and train.zero_stage == 3:
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm,
        "bf16": {"enabled": train.dtype == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # on a GPU, DeepSpeed's throughput timer makes the host wait for the device before every forward pass
        "timers": {"throughput": {"enabled": False}},
    }
    if train.zero_stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def offload_threads(manifest: Manifest, environment: Mapping[str, str], cores: int) -> int | None:
    """Return the threads of a rank whose optimizer runs on the CPU beside a GPU; None to keep torch's number.

    torchrun sets ``OMP_NUM_THREADS`` to 1 where the user has not set it. Then the rank gets its share of the cores.
    """
    if manifest.train.offload == "none" or environment.get("OMP_NUM_THREADS", "1") != "1":
        return None
    return max(1, cores // int(environment.get("LOCAL_WORLD_SIZE", "1")))
