"""torch's device ``emu`` and ``torch.emu``; what the host waits for and copies, with the line that asked for it."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from tests.helpers.emulator.build import build_library
from tests.helpers.paths import ROOT

#: kinds of events for which a GPU's host does not wait; collectives are no waits either
ASYNCHRONOUS = {"copy from pinned memory", "copy to pinned host memory"}
Reporter = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64)


@dataclass(frozen=True)
class Event:
    """A wait, copy or collective: its kind, bytes, and the line of the project that caused it, ``loop.py:312``."""

    kind: str
    size: int
    line: str
    is_collective: bool = False

    @property
    def is_wait(self) -> bool:
        """Whether the host of a GPU would wait. A copy from pageable memory is one: it is staged."""
        return not self.is_collective and self.kind not in ASYNCHRONOUS


class Events(list[Event]):
    """The events of a block of code, in their order."""

    def waits(self) -> Counter[str]:
        """Return how often the host waits, by kind and line."""
        return Counter(f"{event.kind} at {event.line}" for event in self if event.is_wait)

    def copies(self) -> Counter[str]:
        """Return the number of copies between host and device, by kind."""
        return Counter(event.kind for event in self if event.kind.startswith("copy"))

    def collectives(self) -> Counter[str]:
        """Return the number of collectives on device tensors, by name."""
        return Counter(event.kind for event in self if event.is_collective)


_listeners: list[Events] = []
_hidden = threading.local()


@contextlib.contextmanager
def count_events() -> Iterator[Events]:
    """Collect the events of the block, of every thread of this process."""
    events = Events()
    _listeners.append(events)
    try:
        yield events
    finally:
        _listeners[:] = [other for other in _listeners if other is not events]


@contextlib.contextmanager
def unreported() -> Iterator[None]:
    """Report no copies of this thread: those of the stand-in's own."""
    _hidden.now = True
    try:
        yield
    finally:
        _hidden.now = False


def note(kind: str, size: int, is_collective: bool = False) -> None:
    """Add an event to every open :func:`count_events`."""
    if _listeners and not getattr(_hidden, "now", False):
        event = Event(kind, size, _project_line(), is_collective)
        for events in _listeners:
            events.append(event)


def _project_line() -> str:
    """Return the innermost line of the trainer or pipeline in this thread, else of any other caller."""
    frame, first = sys._getframe(2), ""
    rooms = (str(ROOT / "trainer"), str(ROOT / "pipeline"), str(ROOT / "framestream"))
    caller: types.FrameType | None = frame
    while caller is not None:
        path = caller.f_code.co_filename
        line = f"{path.rsplit('/', 1)[-1]}:{caller.f_lineno}"
        if path.startswith(rooms):
            return line
        if not first and "/tests/helpers/emulator/" not in path:
            first = line
        caller = caller.f_back
    return first or "no line"


@Reporter
def _report(kind: bytes, size: int) -> None:
    note(kind.decode(), size)


@functools.cache
def load_device() -> None:
    """Load the device into torch. There are as many as this machine has ranks, and one without a launcher."""
    library = ctypes.CDLL(str(build_library()))
    library.emu_allocated.restype = library.emu_peak.restype = ctypes.c_int64
    devices = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    library.emu_register(devices)
    library.emu_report_to(_report)
    torch.utils.rename_privateuse1_backend("emu")
    torch._register_device_module("emu", _device_module(library, devices))
    torch.Tensor.record_stream = lambda tensor, stream: None  # torch's own takes only streams of its own
    torch.nn.functional.scaled_dot_product_attention = _fused_attention()
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)


def _fused_attention() -> Callable:
    """Return ``scaled_dot_product_attention`` with the CPU's fused kernel for the device's tensors, as on a GPU.

    torch would choose its unfused one, which keeps every probability for the backward pass.
    """
    unfused = torch.nn.functional.scaled_dot_product_attention
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> torch.Tensor:
        if query.device.type == "emu" and attn_mask is None and query.dim() == 4 and query.numel():
            return fused(query, key, value, dropout_p, is_causal, scale=scale)[0]
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal}
        return unfused(query, key, value, **options, scale=scale, enable_gqa=enable_gqa)

    return scaled_dot_product_attention


class Stream:
    """A stream whose work is complete when it is queued."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: StreamEvent | None = None) -> StreamEvent:
        return event or StreamEvent()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note("synchronize", 0)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class StreamEvent:
    """An event of a stream. It has happened as soon as it is recorded."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        note("synchronize", 0)

    def elapsed_time(self, other: object) -> float:
        return 0.0


def _device_module(library: ctypes.CDLL, devices: int) -> types.ModuleType:
    """Return ``torch.emu``, with the names of ``torch.cuda`` that torch, DeepSpeed and the trainer use."""
    stream = Stream()

    def memory_stats(device: object = None) -> dict[str, int]:
        return {"allocated_bytes.all.current": library.emu_allocated(), "allocated_bytes.all.peak": library.emu_peak()}

    def set_device(device: int | str | torch.device) -> None:
        library.emu_set_device(device if isinstance(device, int) else torch.device(device).index)

    functions: dict[str, Callable | type] = {
        "Stream": Stream,
        "Event": StreamEvent,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "set_stream": lambda stream: None,
        "synchronize": lambda device=None: note("synchronize", 0),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": library.emu_current_device,
        "set_device": set_device,
        "device_count": lambda: devices,
        "device": lambda device: contextlib.nullcontext(),
        "get_device_name": lambda device=None: "emu",
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "manual_seed": lambda seed: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(8, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "empty_cache": lambda: None,
        "memory_stats": memory_stats,
        "memory_allocated": lambda device=None: library.emu_allocated(),
        "memory_reserved": lambda device=None: library.emu_allocated(),
        "max_memory_allocated": lambda device=None: library.emu_peak(),
        "max_memory_reserved": lambda device=None: library.emu_peak(),
        "reset_peak_memory_stats": lambda device=None: library.emu_reset_peak(),
    }
    module = types.ModuleType("torch.emu")
    module.__dict__.update(functions)
    return module
