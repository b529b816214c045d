"""One rank of test_calls.py: calls a small model, on rank 1 sometimes differently, and compares.

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
    place = init_process_group(timeout_minutes=2)
    model = nn.ModuleDict(
        {"tower": nn.Linear(4, 4), "head": nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))}
    )
    log = ModuleCallTracer(model)
    row, told = torch.zeros(1, 4), {}

    def compare(name: str, *calls: nn.Module) -> None:
        for call in calls:
            call(row)
        try:
            log.compare(place)
            told[name] = ""
        except CallOrderError as error:
            told[name] = str(error)

    try:
        compare("equal", model["tower"], model["head"])
        compare("more", model["tower"], *([model["tower"]] if place.rank else []))
        compare("other order", *[model["tower"], model["head"]][:: -1 if place.rank else 1])
        compare("none", *([] if place.rank else [model["tower"]]))
        compare("equal again", model["head"])
    finally:
        destroy_process_group()
    (folder / f"{place.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
