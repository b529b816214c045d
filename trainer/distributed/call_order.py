"""Debug check (``train.check_calls``) that all ranks call the same modules in the same order.

ZeRO-3 gathers parameters in module calls. Ranks whose calls differ wait for each other forever, or gather the wrong
parameters. A leaf module gathers all its parameters in its own call, so calls inside may differ: the vision tower runs
as many groups as the rank's row needs. The tracer counts every call of a leaf module, and of other modules that own
parameters, recomputation in the backward pass included. After each global batch the ranks compare counts and a checksum
of the names. Heartbeats carry the last call of each rank, so that it can be reported when the ranks hang before the
comparison.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import nn

from framestream.trainer.distributed.process_group import DistributedContext, all_gather


class CallOrderError(RuntimeError):
    """Ranks called different modules. The message names the first call that differs, in one line."""


class ModuleCallTracer:
    """Records the module calls of one rank since the last comparison.

    Args:
        model: the model.
        leaves: its leaf modules (:meth:`framestream.trainer.model.video_llm.VideoLLM.leaf_modules`).
    """

    def __init__(self, model: nn.Module, leaves: Sequence[nn.Module] = ()) -> None:
        self._calls: list[int] = []
        modules = outer_modules(model, leaves)
        self._names = list(modules)
        for number, module in enumerate(modules.values()):
            module.register_forward_pre_hook(lambda *_, number=number: self._calls.append(number))

    def last_call(self) -> str:
        """Return number and module name of the last call, for the heartbeat."""
        calls = self._calls
        return f"call {len(calls)}, {self._name(calls, len(calls) - 1)}"

    def compare(self, context: DistributedContext) -> None:
        """Compare the calls of all ranks, then start a new record. All ranks call this together.

        Raises:
            CallOrderError: two ranks differ; raised on every rank.
        """
        calls, self._calls = self._calls, []
        summary = torch.tensor([len(calls), zlib.crc32(str(calls).encode())])
        counts = all_gather(summary, context)
        if (counts == counts[0]).all():
            return
        padded = torch.full((int(counts[:, 0].max()),), -1)
        padded[: len(calls)] = torch.tensor(calls, dtype=torch.int64)
        table = all_gather(padded, context)
        differing = (table != table[0]).nonzero()
        first = int(differing[:, 1].min())
        rank = int(differing[differing[:, 1] == first][0, 0])
        here, there = (self._name(table[n].tolist(), first) for n in (rank, 0))
        raise CallOrderError(
            f"ranks call the model differently: call {first + 1} of a global batch is {here} on rank {rank} and "
            f"{there} on rank 0, of {counts[rank, 0]} and {counts[0, 0]} calls; this is a fault of the model's code"
        )

    def _name(self, calls: list[int], index: int) -> str:
        return self._names[calls[index]] if 0 <= index < len(calls) and calls[index] >= 0 else "no call"


def outer_modules(model: nn.Module, leaves: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return name -> module of the leaf modules, and of the modules outside them that own parameters."""
    inside = {module for leaf in leaves for module in leaf.modules()} - set(leaves)
    return {
        name: module
        for name, module in model.named_modules()
        if module in leaves or (module not in inside and next(module.parameters(recurse=False), None) is not None)
    }
