"""Make the device this process's accelerator."""

from __future__ import annotations

import os

from tests.helpers.emulator.device import load_device


def install() -> None:
    """Make the device that of torch, DeepSpeed and the trainer. Call it before DeepSpeed chooses an accelerator."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # of the imports below; then replaced
    load_device()
    import deepspeed
    from deepspeed.accelerator import set_accelerator

    from tests.helpers.emulator.accelerator import EmuAccelerator
    from tests.helpers.emulator.collectives import route_collectives

    set_accelerator(EmuAccelerator())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    route_collectives()
