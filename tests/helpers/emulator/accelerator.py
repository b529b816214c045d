"""DeepSpeed's view of the device: as asynchronous as a GPU, so that DeepSpeed takes the same ways as on one."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from tests.helpers.emulator.device import Stream, StreamEvent

GIB = 1024**3


class EmuAccelerator(CPU_Accelerator):
    """The stand-in device. Each rank has one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._name = "emu"
        self._communication_backend_name = "gloo"

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return False

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return "emu" if device_index is None else f"emu:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return torch.emu.device(device_index)

    def set_device(self, device_index: int) -> None:
        torch.emu.set_device(device_index)

    def current_device(self) -> int:
        return torch.emu.current_device()

    def current_device_name(self) -> str:
        return f"emu:{self.current_device()}"

    def device_count(self) -> int:
        return torch.emu.device_count()

    def synchronize(self, device_index: int | None = None) -> None:
        torch.emu.synchronize()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "emu"

    def pin_memory(self, tensor: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def stream(self, stream: Stream) -> Any:
        return torch.emu.stream(stream)

    def current_stream(self, device_index: int | None = None) -> Stream:
        return torch.emu.current_stream()

    def default_stream(self, device_index: int | None = None) -> Stream:
        return torch.emu.current_stream()

    @property
    def Stream(self) -> type:  # noqa: N802
        return Stream

    @property
    def Event(self) -> type:  # noqa: N802
        return StreamEvent

    def empty_cache(self) -> None: ...

    def memory_allocated(self, device_index: int | None = None) -> int:
        return torch.emu.memory_allocated()

    def max_memory_allocated(self, device_index: int | None = None) -> int:
        return torch.emu.max_memory_allocated()

    def reset_peak_memory_stats(self, device_index: int | None = None) -> None:
        torch.emu.reset_peak_memory_stats()

    def memory_stats(self, device_index: int | None = None) -> dict[str, int]:
        return torch.emu.memory_stats()

    def total_memory(self, device_index: int | None = None) -> int:
        return 80 * GIB

    def available_memory(self, device_index: int | None = None) -> int:
        return 80 * GIB - torch.emu.memory_allocated()

    @property
    def FloatTensor(self) -> Any:  # noqa: N802
        return _maker(torch.float32)

    @property
    def ByteTensor(self) -> Any:  # noqa: N802
        return _maker(torch.uint8)

    @property
    def IntTensor(self) -> Any:  # noqa: N802
        return _maker(torch.int32)

    @property
    def LongTensor(self) -> Any:  # noqa: N802
        return _maker(torch.int64)


def _maker(dtype: torch.dtype) -> Any:
    return lambda values: torch.tensor(values, dtype=dtype, device="emu")
