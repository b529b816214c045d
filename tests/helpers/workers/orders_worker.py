"""One rank of test_orders.py: run every order of rows under every setting and compare calls; rank 0 writes gradients.

    torchrun --nproc_per_node 2 -m tests.helpers.workers.orders_worker FOLDER

Works in FOLDER, where ``start/`` has the initial weights. Writes WORLD.json, SETTING -> ORDER -> loss, and
WORLD-SETTING-ORDER.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file

from framestream.trainer.distributed.call_order import ModuleCallTracer
from framestream.trainer.distributed.process_group import all_reduce_sum, destroy_process_group, init_process_group
from framestream.trainer.training.engine import build_engine
from tests.helpers.model.orders import ON_FOUR, SETTINGS, settings, side_by_side


def gradients(engine, calls: ModuleCallTracer, order: tuple[str, ...], context) -> tuple[float, dict]:
    """Return loss and gradients of one global batch, computed as in the training loop, without a weight update."""
    loss, steps = 0.0, side_by_side(order, context.world)
    for number, rows in enumerate(steps):
        part = engine(rows[context.rank].to(context.device)) / len(order)
        engine.set_gradient_accumulation_boundary(number + 1 == len(steps))
        engine.backward(part * context.world)
        loss += part.item()
    found = {name: safe_get_full_grad(p).clone().cpu() for name, p in engine.module.named_parameters()}
    calls.compare(context)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    engine.step()
    return all_reduce_sum([loss], context)[0], found


def main() -> None:
    os.chdir(sys.argv[1])
    context = init_process_group(timeout_minutes=4)
    losses: dict[str, dict[str, float]] = {}
    try:
        for name, (train, orders) in SETTINGS.items():
            if context.world > 2 and name != "zero3":
                continue
            engine, model = build_engine(settings(**train), context)
            calls = ModuleCallTracer(model, model.leaf_modules())
            losses[name] = {}
            for order in orders if context.world == 2 else ON_FOUR:
                loss, found = gradients(engine, calls, order, context)
                losses[name]["-".join(order)] = loss
                if context.is_main:
                    save_file(found, f"{context.world}-{name}-{'-'.join(order)}.safetensors")
            engine.destroy()
    finally:
        destroy_process_group()
    if context.is_main:
        Path(f"{context.world}.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
