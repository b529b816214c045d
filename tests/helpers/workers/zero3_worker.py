"""One rank of test_zero3.py: train on given rows under ZeRO-3, check what needs a sharded run, and save.

    torchrun --nproc_per_node 2 -m tests.helpers.workers.zero3_worker FOLDER

The cases are those of ``zero3_cases.cases``. Their initial weights are in FOLDER, and results go to FOLDER/NAME/. Rank
0 works in FOLDER and the others in an empty folder, so that only rank 0 finds the files that manifests name.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad

from benchmarks.model.zero_stages import build_narrow_engine, narrow_manifest, run_micro_step
from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.distributed.process_group import (
    DistributedContext,
    destroy_process_group,
    init_process_group,
)
from framestream.trainer.model.video_llm import build_model
from framestream.trainer.training.engine import TrainingEngine, build_engine
from framestream.trainer.training.lockstep import LockstepModel
from framestream.trainer.weights.load import initialize, save_weights
from framestream.trainer.weights.tensor_files import WeightsError
from tests.helpers.model.manifests import manifest
from tests.helpers.model.rows import SIZE, SMALL, dialogue, pack
from tests.helpers.model.zero3_cases import RATE, cases


def run_case(name: str, settings, steps, folder: Path, context) -> None:
    """Train on this rank's rows; write every loss and the final weights."""
    engine, model = build_engine(settings, context)
    assert engine.zero_optimization_stage() == 3
    for group in engine.optimizer.param_groups:
        group["lr"] = RATE
    losses = []
    for rows in steps:
        loss = engine(rows[context.rank].to(context.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    (folder / f"{name}-{context.rank}.json").write_text(json.dumps(losses))
    save_weights(model, folder / name, settings, 20_000)


def accumulation_error(stage: int, context: DistributedContext) -> float:
    """Compare the gradient of a global batch of 64 micro-steps, all weights in bf16, with the sum of its micro-steps.

    Returns the norm of the difference from the float64 sum, relative to that of the sum.
    """
    base = manifest(SIZE, SMALL)
    train = dataclasses.replace(base.train, zero_stage=stage, clip_norm=0.0)
    init = InitFromConfig(vision_tower="random", language_model="random")
    engine, model = build_engine(dataclasses.replace(base, train=train, init_from=init), context)
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    rows = [pack([dialogue(10 * context.rank + number)]).to(context.device) for number in range(4)]

    def gradient(micro_steps: list[Batch]) -> dict[str, torch.Tensor]:
        for number, row in enumerate(micro_steps, start=1):
            loss = engine(row)
            engine.set_gradient_accumulation_boundary(number == len(micro_steps))
            engine.backward(loss / 64)
        found = {name: safe_get_full_grad(parameter).double() for name, parameter in model.named_parameters()}
        engine.step()
        return found

    parts = [gradient([row]) for row in rows]
    total = {name: 16 * sum(part[name] for part in parts) for name in parts[0]}
    found = gradient(rows * 16)
    engine.destroy()
    difference = sum((found[name] - value).square().sum() for name, value in total.items())
    return float((difference / sum(value.square().sum() for value in total.values())).sqrt())


def run_rows_of_other_groups(context: DistributedContext) -> list[dict]:
    """Run rows whose number of groups differs between the ranks and from row to row, in a model of published depth.

    After the optimizer's step, rows and a question are run as a validation does.

    Returns what each micro-step after the first two took, which record DeepSpeed's trace.
    """
    engine = build_narrow_engine(narrow_manifest(3, 16, "fp32"), context)
    clips = ([1, 1, 1, 3, 0, 2], [1, 1, 2, 1, 3, 0])[context.rank]
    found = []
    for number, count in enumerate(clips):
        found.append(run_micro_step(engine, count, context, number == 3))
        if number == 3:
            validate(engine, context)
    engine.destroy()
    return [dataclasses.asdict(micro_step) for micro_step in found[2:]]


def validate(engine: TrainingEngine, context: DistributedContext) -> None:
    """Run a row of each rank, one of rank 0 alone, and its question, whose answer the other rank waits for."""
    rows = [pack([dialogue(n, clips=n + 1 + context.rank)]).to(context.device) for n in range(2)]
    model = LockstepModel(engine.module.eval(), context, pack([]).to(context.device))
    losses = [model.loss(rows[0]), model.loss(rows[1] if context.is_main else None)]
    assert losses[0] > 0 and bool(losses[1]) == context.is_main
    options = [[5], [7, 9, 11]] if context.is_main else []
    tokens, logprobs = model.answer(rows[1] if context.is_main else None, options, True, 5, (-1,))
    assert (len(tokens), len(logprobs)) == ((5, 2) if context.is_main else (0, 0))
    assert engine.optimizer.parameter_offload.get_param_coordinator().is_complete_trace()
    engine.optimizer.empty_partition_cache()
    engine.module.train()


def check_constants(settings) -> None:
    """Check that positions and RoPE frequencies created inside zero.Init in 16 bit equal those created outside."""
    outside = dict(build_model(settings).named_buffers())
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "bf16": {"enabled": True}}):
        model = build_model(settings)
    assert all(torch.equal(outside[name], buffer) for name, buffer in model.named_buffers())


def check_errors(settings) -> None:
    """Check that every rank raises the error of rank 0 instead of waiting for it."""
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2}):
        model = build_model(settings)
    nowhere = InitFromConfig(vision_tower="nowhere/at/all", language_model="random")
    try:
        initialize(model, dataclasses.replace(settings, init_from=nowhere))
    except WeightsError as error:
        assert "nowhere/at/all" in str(error)
    else:
        raise AssertionError("no error")


def main() -> None:
    folder = Path(sys.argv[1])
    context = init_process_group(timeout_minutes=2)
    nothing = folder / f"rank-{context.rank}"
    nothing.mkdir()
    os.chdir(nothing if context.rank else folder)
    try:
        for name, (settings, steps) in cases().items():
            run_case(name, settings, steps, folder, context)
        errors = {stage: accumulation_error(stage, context) for stage in (2, 3)}
        (folder / f"accumulation-{context.rank}.json").write_text(json.dumps(errors))
        (folder / f"groups-{context.rank}.json").write_text(json.dumps(run_rows_of_other_groups(context)))
        check_constants(settings)
        check_errors(settings)
    finally:
        destroy_process_group()


if __name__ == "__main__":
    main()
