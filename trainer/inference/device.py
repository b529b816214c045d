"""The device on which a process runs a model that is not trained. DeepSpeed is not imported for it."""

from __future__ import annotations

import os

import torch

from framestream.trainer.distributed.launchers import local_rank


def select_device() -> torch.device:
    """Select and return the device of this process: the GPU numbered ``LOCAL_RANK``, 0 by default, or the CPU.

    Raises:
        LaunchError: there are fewer GPUs than processes.
    """
    if not hasattr(torch, "accelerator"):  # before torch 2.6
        kind, count = "cuda" if torch.cuda.is_available() else "cpu", torch.cuda.device_count()
    else:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind, count = found.type if found else "cpu", torch.accelerator.device_count()
    if kind == "cpu":
        return torch.device("cpu")
    local = local_rank(os.environ, count)
    torch.get_device_module(kind).set_device(local)
    return torch.device(kind, local)
