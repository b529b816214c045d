"""One rank of test_call_order.py: what two ranks do together, without a model of any size.

They call a small model, on rank 1 sometimes in another order, and compare calls. Then rank 0 opens shards, for longer
than any limit, and fails to open others.

torchrun --nproc_per_node 2 calls_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.distributed.call_order import CallOrderError, ModuleCallTracer
from framestream.trainer.distributed.process_group import (
    DistributedContext,
    destroy_process_group,
    init_process_group,
)
from framestream.trainer.distributed.run_store import MainRankError, main_rank_first, open_store
from framestream.trainer.distributed.watchdog import Watchdog
from framestream.trainer.training import loop

LIMIT = 6.0  #: seconds of ``train.timeout_minutes`` while rank 0 opens shards


def open_shards(folder: Path, context: DistributedContext, messages: dict[str, str]) -> None:
    """Open shards under a watchdog and collective calls with a limit that rank 0 exceeds."""
    torch.distributed.distributed_c10d._set_pg_timeout(timedelta(seconds=LIMIT), None)
    settings = SimpleNamespace(train=SimpleNamespace(timeout_minutes=LIMIT / 60))
    opened = folder / "opened"

    def build_slowly(manifest: Any, rank: int, world: int) -> str:
        if rank:
            return opened.read_text()
        time.sleep(1.4 * LIMIT)
        opened.write_text("by rank 0")
        return opened.read_text()

    def fail() -> None:
        raise ShardsError("stage2: damaged" if context.is_main else "rank 1 did not wait")

    loop.build_loader = build_slowly
    watchdog = Watchdog(LIMIT / 60, context)
    try:
        messages["slow"] = loop._open_loader(settings, context, watchdog)
        with main_rank_first(open_store(LIMIT / 60), "failing", context.rank):
            fail()
    except (MainRankError, ShardsError) as error:
        messages["failing"] = str(error)
    finally:
        watchdog.close()


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
        open_shards(folder, context, messages)
    finally:
        destroy_process_group()
    (folder / f"{context.rank}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main()
