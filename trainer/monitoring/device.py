"""Peak FLOP/s of a device, looked up by name, and its peak memory in use."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from framestream.pipeline.config.training import TrainConfig

#: TFLOP/s of dense bf16 matrix products, from the makers' data sheets (the figure without sparsity), at full power.
#: The first key that is part of a device's name applies.
BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.4,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 311.9,
    "A800": 311.9,
    "A40": 149.7,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
    "MI300X": 1307.4,
}


def peak_flops(train: TrainConfig, device: torch.device) -> float | None:
    """Return the peak FLOP/s of one rank's device: ``train.peak_tflops``, or the bf16 peak by name; None if unknown.

    The speed of float32 products differs between generations, and a CPU's depends on its cores. State these in
    ``train.peak_tflops``.
    """
    if train.peak_tflops is not None:
        return train.peak_tflops * 1e12
    if device.type != "cuda" or train.dtype != "bf16":
        return None
    return named_peak(torch.cuda.get_device_name(device))


def named_peak(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a device by its driver's name for it, such as ``NVIDIA H100 80GB HBM3``."""
    found = (tflops for name, tflops in BF16_TFLOPS.items() if name in device_name)
    tflops = next(found, None)
    return None if tflops is None else tflops * 1e12


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of a GPU's allocations since the last call, or of this process.

    That of the process is measured since its start, or since the last :func:`reset_peak_memory`.

    The memory of a process is its resident set, which includes mapped pages of the shards.
    """
    if device.type == "cpu":
        return process_peak()
    memory = torch.get_device_module(device)
    most = memory.max_memory_allocated(device)
    memory.reset_peak_memory_stats(device)
    return most


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` measure from now on. Where a process may not reset its own peak, it stays the highest."""
    if device.type == "cpu":
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    else:
        torch.get_device_module(device).reset_peak_memory_stats(device)


def process_peak() -> int:
    """Return the peak resident set of this process in bytes.

    ``getrusage`` is not used, because it includes the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
