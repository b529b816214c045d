"""The best validation of a run, and patience, also over a resume."""

from __future__ import annotations

import json
import logging
import math

import pytest

from framestream.pipeline.config.training import EvaluateConfig
from framestream.trainer.training.best_score import BestScore


def config(**over: object) -> EvaluateConfig:
    return EvaluateConfig(every=10, **over)


def test_the_lowest_loss_is_the_best_and_patience_counts_from_it():
    best = BestScore(config(patience=2))
    found = [best.add(10 * (n + 1), {"loss": loss}) for n, loss in enumerate([3.0, 2.0, 2.0, 2.5])]
    assert found == [True, True, False, False] and best.is_over
    assert (best.best_step, best.best, best.stale, best.step) == (20, 2.0, 2, 40)
    assert best.add(50, {"loss": 1.0}) and not best.is_over


def test_the_highest_accuracy_is_the_best_whatever_the_loss():
    best = BestScore(config(best="accuracy"))
    for step, loss, accuracy in ((10, 1.0, 40.0), (20, 2.0, 60.0), (30, 0.5, 60.0)):
        best.add(step, {"loss": loss, "accuracy": accuracy})
    assert (best.best_step, best.best) == (20, 60.0) and not best.is_over  # without patience it never is


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_the_best(score):
    best = BestScore(config(patience=3))
    assert not best.add(10, {"loss": score}) and best.best_step == 0
    assert best.add(20, {"loss": 5.0}) and not best.add(30, {"loss": score})
    assert json.loads(json.dumps(best.state_dict(), allow_nan=False))["scores"] == {"loss": None}
    other = BestScore(config(best="likelihood", patience=1))
    assert not other.add(10, {"loss": 1.0}) and other.is_over  # no question had options that could be read


def test_a_resumed_run_goes_on_with_the_same_best_and_patience():
    straight, parts = BestScore(config(patience=3)), BestScore(config(patience=3))
    losses = [3.0, 2.0, 2.5, 2.25, 2.75]
    for n, loss in enumerate(losses):
        straight.add(n + 1, {"loss": loss})
        parts.add(n + 1, {"loss": loss})
        saved, parts = json.dumps(parts.state_dict()), BestScore(config(patience=3))
        parts.load_state_dict(json.loads(saved))
        assert parts.state_dict() == straight.state_dict() and parts.is_over == straight.is_over == (n == 4)


@pytest.mark.parametrize("change", [{"best": "accuracy"}, {"questions": 5}])
def test_a_best_score_of_other_questions_is_not_compared(change, caplog):
    caplog.set_level(logging.INFO, "framestream")
    best = BestScore(config())
    best.add(10, {"loss": 0.1, "accuracy": 99.0})
    other = BestScore(config(**change))
    other.load_state_dict(best.state_dict())
    assert other.best_step == 0 and other.step == 10 and "the next validation is the best again" in caplog.text
    assert other.add(20, {"loss": 7.0, "accuracy": 1.0})


def test_the_record_of_an_interrupted_validation_is_kept_once():
    best = BestScore(config())
    best.pending = {"step": 10, "loss": None, "grad_norm": 2.0, "mfu": None}
    resumed = BestScore(config())
    resumed.load_state_dict(json.loads(json.dumps(best.state_dict())))
    record = resumed.take_pending()
    assert math.isnan(record.pop("loss")) and record == {"step": 10, "grad_norm": 2.0, "mfu": None}
    assert resumed.take_pending() is None
