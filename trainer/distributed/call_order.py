"""Debug mode (``train.check_calls``): do all ranks call the same modules in the same order?

ZeRO-3 gathers parameters in module calls, so ranks that call differently wait for each other for ever, or gather the
wrong thing. The log counts every call of a module that owns parameters, recomputation in the backward pass included.
After each global batch the ranks compare counts and a checksum of the names; in between the heartbeat says how far each
has come, which is what is left to say once they hang.
"""

from __future__ import annotations

import zlib

import torch
from torch import nn

from framestream.trainer.distributed.process_group import DistributedContext, all_gather


class CallOrderError(RuntimeError):
    """Ranks called different modules; one line that names the first call that differs."""


class ModuleCallTracer:
    """The calls of one rank's model since the last comparison."""

    def __init__(self, model: nn.Module) -> None:
        self._calls: list[int] = []
        self._names: list[str] = []
        for name, module in model.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                number = len(self._names)
                self._names.append(name)
                module.register_forward_pre_hook(lambda *_, number=number: self._calls.append(number))

    def last_call(self) -> str:
        """Where this rank is, for the heartbeat: the number and the name of its last call."""
        calls = self._calls
        return f"call {len(calls)}, {self._name(calls, len(calls) - 1)}"

    def compare(self, place: DistributedContext) -> None:
        """Compare with all ranks and begin anew; every rank calls this.

        Raises:
            CallsError: on every rank, where any two differ.
        """
        calls, self._calls = self._calls, []
        mine = torch.tensor([len(calls), zlib.crc32(str(calls).encode())])
        counts = all_gather(mine, place)
        if (counts == counts[0]).all():
            return
        padded = torch.full((int(counts[:, 0].max()),), -1)
        padded[: len(calls)] = torch.tensor(calls, dtype=torch.int64)
        table = all_gather(padded, place)
        differing = (table != table[0]).nonzero()
        first = int(differing[:, 1].min())
        rank = int(differing[differing[:, 1] == first][0, 0])
        here, there = (self._name(table[n].tolist(), first) for n in (rank, 0))
        raise CallOrderError(
            f"ranks call the model differently: call {first + 1} of a global batch is {here} on rank {rank} and "
            f"{there} on rank 0, of {counts[rank, 0]} and {counts[0, 0]} calls; this is a fault of the model's code"
        )

    def _name(self, calls: list[int], place: int) -> str:
        return self._names[calls[place]] if 0 <= place < len(calls) and calls[place] >= 0 else "no call"
