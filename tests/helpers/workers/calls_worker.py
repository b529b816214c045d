"""One rank of test_call_order.py: call a small model, on rank 1 sometimes in another order, and compare calls.

torchrun --nproc_per_node 2 calls_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from framestream.trainer.distributed.call_order import CallOrderError, ModuleCallTracer
from framestream.trainer.distributed.process_group import destroy_process_group, init_process_group


def main() -> None:
    folder = Path(sys.argv[1])
    context = init_process_group(timeout_minutes=2)
    model = nn.ModuleDict(
        {"tower": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))}
    )
    tracer = ModuleCallTracer(model)
    row, messages = torch.zeros(1, 4), {}

    def compare(name: str, *calls: nn.Module) -> None:
        for call in calls:
            call(row)
        try:
            tracer.compare(context)
            messages[name] = ""
        except CallOrderError as error:
            messages[name] = str(error)

    try:
        compare("equal", model["tower"], model["head"])
        compare("more", model["tower"], *([model["tower"]] if context.rank else []))
        compare("other order", *[model["tower"], model["head"]][:: -1 if context.rank else 1])
        compare("none", *([] if context.rank else [model["tower"]]))
        compare("equal again", model["head"])
    finally:
        destroy_process_group()
    (folder / f"{context.rank}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main()
