"""Gather all parameters that ZeRO-3 keeps complete on every rank in one collective after a step.

DeepSpeed gathers each of them in a collective of its own: hundreds of small ones, for which a
small model waits longer than it computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from framestream.trainer.distributed.process_group import dist


def coalesce_gather(parameters: Sequence[Any]) -> None:
    """Make the gather of exactly ``parameters``, the list ``persistent_parameters`` of the optimizer, one collective.

    Other gathers stay DeepSpeed's, and all of them where partitions are quantized or have several dtypes.
    """
    if not parameters:
        return
    partitions = [parameter.ds_tensor for parameter in parameters]
    if any(hasattr(p, "ds_quant_scale") for p in partitions) or len({p.dtype for p in partitions}) > 1:
        return
    first, gather = parameters[0], parameters[0].all_gather

    def all_gather(param_list: Sequence[Any] | None = None, **options: Any) -> Any:
        if param_list is not parameters or options:
            return gather(param_list, **options)
        _gather([parameter for parameter in parameters if parameter.ds_status.name == "NOT_AVAILABLE"])
        return None

    first.all_gather = all_gather


def _gather(parameters: Sequence[Any]) -> None:
    """Fill ``data`` of partitioned parameters from all ranks, and mark them as complete."""
    if not parameters:
        return
    device, group = parameters[0].device, parameters[0].ds_process_group
    sizes = [parameter.ds_tensor.numel() for parameter in parameters]
    own = torch.cat([parameter.ds_tensor.to(device).view(-1) for parameter in parameters])
    flat = own.new_empty(dist.get_world_size(group), sum(sizes))
    dist.all_gather_into_tensor(flat.view(-1), own, group=group)
    for parameter, parts in zip(parameters, flat.split(sizes, dim=1), strict=True):
        parameter.data = parts.flatten()[: parameter.ds_numel].view(parameter.ds_shape)
        parameter.ds_status = type(parameter.ds_status).AVAILABLE
