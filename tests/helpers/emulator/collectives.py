"""torch's collectives on device tensors: through host memory and gloo, as complete when they return.

Tensors of the host go to gloo as before. A collective whose tensors are on two devices fails.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from tests.helpers.emulator.device import note, unreported

#: collective -> arguments that it writes
OUTPUTS = {
    "all_reduce": ("tensor",),
    "broadcast": ("tensor",),
    "all_gather_into_tensor": ("output_tensor",),
}
_all_reduce = c10d.all_reduce


class _Complete:
    """The handle of a collective that is complete."""

    def wait(self, timeout: object = None) -> bool:
        return True

    def is_completed(self) -> bool:
        return True


@functools.cache
def route_collectives() -> None:
    """Let ``torch.distributed`` accept tensors of the device."""
    for name, outputs in OUTPUTS.items():
        _replace(name, _through_host(getattr(c10d, name), name, outputs))
    _replace("reduce_scatter_tensor", _reduce_scatter)


def _replace(name: str, function: Any) -> None:
    setattr(c10d, name, function)
    setattr(dist, name, function)


def _check_devices(name: str, *tensors: torch.Tensor) -> bool:
    """Return whether the tensors are on the device."""
    kinds = {tensor.device.type for tensor in tensors}
    assert len(kinds) == 1, f"{name}: tensors on {sorted(kinds)}"
    return kinds == {"emu"}


def _through_host(real: Any, name: str, outputs: tuple[str, ...]) -> Any:
    signature = inspect.signature(real)

    @functools.wraps(real)
    def collective(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = bound.arguments
        tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        if not _check_devices(name, *tensors.values()):
            return real(*args, **kwargs)
        note(name, max(tensor.nbytes for tensor in tensors.values()), is_collective=True)
        host = {key: _to_host(tensor) for key, tensor in tensors.items()}
        real(**{**values, **host, "async_op": False})
        for key in outputs:
            _from_host(host[key], tensors[key])
        return _Complete() if values["async_op"] else None

    return collective


def _reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
) -> Any:
    """Add in float32, whatever the tensors' dtype. gloo has no reduce_scatter of its own."""
    if not _check_devices("reduce_scatter_tensor", output, input):
        raise NotImplementedError("reduce_scatter_tensor of host tensors")
    note("reduce_scatter_tensor", input.nbytes, is_collective=True)
    total = _to_host(input).float()
    _all_reduce(total, op=op, group=group)
    own = total.chunk(dist.get_world_size(group))[dist.get_rank(group)]
    _from_host(own.to(output.dtype).view(output.shape), output)
    return _Complete() if async_op else None


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that no event reports."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return _silent(host, tensor)


def _from_host(host: torch.Tensor, tensor: torch.Tensor) -> None:
    _silent(tensor.data, host)


def _silent(to: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    with unreported():
        return to.copy_(source.detach())
