"""Validation of a small model on a small root: its scores, its ranks, and what it must not touch."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.evaluation.held_out import HeldOutDialogues
from framestream.pipeline.loading.loader import Loader, build_loader
from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.distributed.preemption import Preempted
from framestream.trainer.distributed.process_group import DistributedContext
from framestream.trainer.inference.generation import generate
from framestream.trainer.model.video_llm import VideoLLM, build_model
from framestream.trainer.monitoring.run_ledger import RunLedger
from framestream.trainer.training import lockstep, validation
from framestream.trainer.training.validation import RowFigures, Validation, summarize_rows
from framestream.trainer.weights.load import initialize
from tests.helpers.corpora.small_root import Root, manifest, turns

MODEL = {
    "vision_tower": {"patch": 8, "width": 32, "depth": 2, "heads": 2, "table_side": 8, "group_tokens": 512},
    "language_model": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
    },
}
WATCHDOG = SimpleNamespace(set_phase=lambda phase: None)
PREEMPTION = SimpleNamespace(raise_if_preempted=lambda context: None)
STEP = {"step": 4, "loss": 2.0, "lr": {}}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Twelve dialogues to learn and seven held out: of videos, of images, of text, with options, and a long answer."""
    made = Root(tmp_path_factory.mktemp("root"))
    videos, still = [made.video(16, 8) for _ in range(3)], made.still(70, 50)
    for n in range(12):
        made.dialogue(turns("<image>\nWhich?", f"number {n}"), [videos[n % 3]])
    options = {"options": ["red", "a long blue", "green"]}
    made.dialogue(turns("<image>\nWhich colour?", "red"), [videos[0]], "val", meta=options)
    made.dialogue(turns("<image>\nWhich of these?", "green"), [videos[1]], "val", meta=options)
    made.dialogue(turns("<image>\nWhich?", "none of them"), [still], "val", meta=options)  # no option is correct
    made.dialogue(turns("<image>\nDescribe it.", "word " * 60), [videos[2]], "val")  # too long to be generated
    made.dialogue(turns("<image>\nA colour?", "blue", "And now?", "red"), [still], "val")
    made.dialogue(turns("One and one?", "2"), [], "val")
    made.dialogue(turns("Two and two?", "4"), [], "val")
    return made.write()


def settings(root: Path, **over: object) -> Manifest:
    return manifest(root, **{"model": MODEL, "evaluate": {"every": 2, "max_new_tokens": 8}, "output": "run", **over})


@pytest.fixture(scope="module")
def loader(root: Path) -> Loader:
    return build_loader(settings(root))


@pytest.fixture(scope="module")
def model(root: Path) -> VideoLLM:
    made = settings(root)
    model = build_model(made)
    initialize(model, made)
    return model.train()


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "all_reduce_sum", lambda values, context: values)
    monkeypatch.setattr(lockstep, "all_reduce_max_int", lambda number, context: number)


def context(rank: int = 0, world: int = 1) -> DistributedContext:
    return DistributedContext(rank, world, torch.device("cpu"))


def validate(made: Manifest, loader: Loader, model: VideoLLM, folder: Path = Path(), **over: object) -> tuple:
    """Return a validation and the figures of its first run."""
    own = Validation(made, loader.dataset, over.pop("context", context()), RunLedger(folder, 0, 1))
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace())
    return own, own.run(engine, dict(STEP), WATCHDOG, over.get("preemption", PREEMPTION))


@torch.no_grad()
def test_scores_are_those_of_the_rows_and_answers_one_by_one(root, loader, model):
    made = settings(root)
    _, figures = validate(made, loader, model)
    dialogues, total, tokens, correct = HeldOutDialogues(made, loader.dataset, 64), 0.0, 0, []
    model.eval()
    for i, question in enumerate(dialogues.questions):
        found = dialogues.read(i)
        total += float(model(found.row))
        tokens += len(found.row.label_positions)
        if question.answer in ("red", "green", "2", "4"):
            (answer,) = generate(model, [found.prompt], 8, dialogues.chat_template.end_ids)
            correct.append(dialogues.chat_template.tokenizer.decode(answer).strip() == question.answer)
    model.train()
    assert figures["val_dialogues"] == len(dialogues) == 7 and figures["val_unreadable"] == 0
    assert figures["val_loss"] == total / tokens == figures["val_best"] and figures["val_best_step"] == 4
    assert len(correct) == 5 and figures["val_accuracy"] == 100 * sum(correct) / 5
    assert figures["val_likelihood"] in (0.0, 50.0, 100.0)
    families = [q.family for q in dialogues.questions if q.answer in ("red", "green", "2", "4")]
    by_family = {family: [ok for f, ok in zip(families, correct, strict=True) if f == family] for family in families}
    assert figures["val_families"] == {family: 100 * sum(ok) / len(ok) for family, ok in by_family.items()}


def test_prompts_end_where_the_last_answer_begins(root, loader):
    dialogues = HeldOutDialogues(settings(root), loader.dataset, 64)
    for i, question in enumerate(dialogues.questions):
        row, prompt, _ = dialogues.read(i)
        end = len(prompt.input_ids)
        answer = dialogues.chat_template.answer_ids(question.answer)
        assert torch.equal(row.input_ids[:end], prompt.input_ids) and torch.equal(row.clips, prompt.clips)
        assert row.input_ids[end : end + len(answer)].tolist() == answer
        assert (prompt.labels == -100).all() and set(row.token_weight.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_has_the_same_scores(root, loader, model, world, monkeypatch):
    def figures(world: int) -> list[float]:
        shares: list[list[float]] = []
        monkeypatch.setattr(validation, "all_reduce_sum", lambda values, context: shares.append(values) or values)
        for rank in range(world):
            validate(settings(root), loader, model, context=context(rank, world))
        return [sum(column) for column in zip(*shares, strict=True)]

    assert figures(world) == figures(1)


def test_training_is_left_as_it_is(root, loader, model):
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = (random.getstate(), np.random.get_state(), torch.get_rng_state(), json.dumps(loader.state_dict()))
    model.connector.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    validate(settings(root), loader, model)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[2])
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[1], strict=True))
    assert json.dumps(loader.state_dict()) == before[3]
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    model.train()


def test_the_same_dialogues_are_chosen_up_to_the_bound(root, loader):
    def keys(**over: object) -> list[str]:
        made = settings(root, **over)
        return HeldOutDialogues(made, loader.dataset, made.evaluate.questions).keys

    some = keys(evaluate={"questions": 3})
    assert len(some) == 3 and some == keys(evaluate={"questions": 3})
    assert [key for key in keys() if key in some] == some and len(keys()) == 7
    assert any(keys(evaluate={"questions": 3}, seed=seed) != some for seed in range(1, 6))


def test_a_run_that_is_asked_to_stop_keeps_the_record_of_its_step(root, loader, model):
    calls = []

    def third_time(context: DistributedContext) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Preempted("SIGTERM", everywhere=True)

    own = Validation(settings(root), loader.dataset, context(), RunLedger(Path(), 0, 1))
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace())
    with pytest.raises(Preempted):
        own.run(engine, {**STEP, "loss": float("nan")}, WATCHDOG, SimpleNamespace(raise_if_preempted=third_time))
    assert all(module.training for module in model.modules())
    state = json.loads(json.dumps(own.best.state_dict(), allow_nan=False))
    assert state["pending"] == {**STEP, "loss": None} and state["step"] == state["best_step"] == 0


def test_a_dialogue_that_cannot_be_read_is_left_out_and_noted(root, loader, model, tmp_path, monkeypatch, caplog):
    read = HeldOutDialogues.read

    def fails_once(self: HeldOutDialogues, i: int) -> object:
        if i == 1:
            raise OSError("shard 3:\ncannot be read")
        return read(self, i)

    monkeypatch.setattr(HeldOutDialogues, "read", fails_once)
    own, figures = validate(settings(root), loader, model, tmp_path)
    assert (figures["val_dialogues"], figures["val_unreadable"]) == (6, 1)
    validate(settings(root), loader, model, tmp_path)
    (row,) = map(json.loads, (tmp_path / "ledger" / "rank000.jsonl").read_text().splitlines())
    assert row["reason"] == "unreadable" and row["message"] == "shard 3: cannot be read" and row["epoch"] is None
    assert caplog.text.count("left out of the validation (shard 3: cannot be read)") == 2


def test_the_best_checkpoint_must_be_there_when_a_run_goes_on(root, loader, tmp_path, caplog):
    own = Validation(settings(root), loader.dataset, context(), RunLedger(tmp_path, 0, 1))
    own.best.add(4, {"loss": 1.0})
    state = own.best.state_dict()
    (tmp_path / "step-000004").mkdir()
    (tmp_path / "step-000004" / "state.json").touch()
    own.resume(state, tmp_path)
    assert own.best.best_step == 4 and own.needs_checkpoint(4) and not caplog.records
    own.resume(state, tmp_path / "elsewhere")
    assert own.best.best_step == 0 and "step-000004: the best checkpoint is gone" in caplog.text


@pytest.mark.parametrize(
    ("best", "fault"),
    [
        ("likelihood", "likelihood: no held-out question has options; choose loss or accuracy"),
        (
            "miou",
            "miou: no held-out question has an interval as its answer, of at most evaluate.max_new_tokens tokens; ",
        ),
        ("accuracy", "accuracy: no held-out question has an answer of at most evaluate.max_new_tokens tokens; choose "),
    ],
)
def test_a_score_that_no_question_has_is_refused(root, loader, best, fault, monkeypatch):
    made = settings(root, evaluate={"every": 2, "best": best, "max_new_tokens": 8})
    kept = HeldOutDialogues._question
    wanted = (lambda q: q.answer.startswith("word")) if best == "accuracy" else (lambda q: not q.options)
    monkeypatch.setattr(
        HeldOutDialogues, "_question", lambda self, n: q if (q := kept(self, n)) and wanted(q) else None
    )
    with pytest.raises(ManifestError, match=f"evaluate.best: {fault}"):
        Validation(made, loader.dataset, context(), RunLedger(Path(), 0, 1))


def test_answers_that_are_intervals_are_scored_by_their_iou(tmp_path, model, monkeypatch):
    """The reply shares 2 s of 4 s with the first question's interval, and nothing with the second's."""
    made = Root(tmp_path)
    for n in range(8):
        made.dialogue(turns("One?", f"{n}"))
    video = made.video(16, 8)
    for interval in ([2.0, 6.0], [7.0, 7.5], [50.0, 60.0]):  # the last one is not shown
        text = f"{interval[0]} - {interval[1]}"
        made.dialogue(turns("<image>\nWhen?", text), [video], "val", meta={"intervals": [interval]})
    made.dialogue(turns("One and one?", "2"), [], "val")
    root = made.write()
    chosen = settings(root, evaluate={"every": 2, "max_new_tokens": 32, "best": "miou"})
    loader = build_loader(chosen)
    tokenizer = HeldOutDialogues(chosen, loader.dataset, 8).chat_template.tokenizer
    reply = tokenizer("From 2.0 to 4.0 seconds.", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(lockstep.LockstepModel, "answer", lambda *_: (reply, []))
    own, figures = validate(chosen, loader, model)
    assert figures["val_miou"] == figures["val_best"] == pytest.approx(25.0) and figures["val_accuracy"] == 0.0
    assert own.best.best_step == 4 and "miou 25.0 %" in own.describe_stop(4, 8)


def test_a_root_without_held_out_rows_is_refused(tmp_path):
    made = Root(tmp_path)
    for n in range(8):
        made.dialogue(turns("One?", f"{n}"))
    root = made.write()
    fault = r"evaluate.every: .*stage2: no dialogues to validate with \(split: val\); add an entry with split: val"
    with pytest.raises(ShardsError, match=fault) as caught:
        Validation(settings(root), build_loader(settings(root)).dataset, context(), RunLedger(Path(), 0, 1))
    assert "\n" not in str(caught.value)


def test_figures_are_added_in_float64_in_their_order():
    rows = [RowFigures(1.0, loss, 1.0) for loss in (1e16, 1.0, -1e16)] + [RowFigures()]
    assert summarize_rows(rows) == {"loss": 0.0}  # from the right it would be 1 / 3
    assert np.isnan(summarize_rows([RowFigures()])["loss"])
    answered = [RowFigures(1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 0.0), RowFigures(1.0, 2.0, 4.0, 1.0)]
    assert summarize_rows(answered) == {"loss": 0.5, "accuracy": 50.0, "likelihood": 0.0}


def test_the_log_has_the_scores_and_the_best(root, loader, model, caplog):
    caplog.set_level(logging.INFO, "framestream")
    own, figures = validate(settings(root), loader, model)
    assert f"validation after step 4: loss {figures['val_loss']:.4f}, accuracy " in caplog.text
    assert "of 7 dialogues; the best so far" in caplog.text
    assert own.describe() == (
        "validation every 2 optimizer steps: 7 held-out dialogues, 5 of them with an answer that is checked"
    )
    own.best.add(6, {"loss": 99.0})
    assert own.describe_stop(6, 20) == (
        "stopped early after step 6 of 20, because 1 validation had no better loss (evaluate.patience: 0); "
        f"the best, loss {figures['val_loss']:.4f}, is run/checkpoints/step-000004"
    )
    own.best.add(8, {"loss": 99.0})
    assert "because 2 validations had no better loss" in own.describe_stop(8, 20)
    assert own.describe_stop(8, 8).startswith("ended with the last step, 8; 2 validations had no better loss (")
