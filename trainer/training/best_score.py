"""The best validation of a run by a named score, and when to stop for want of a better one (``evaluate.patience``).

This state is part of every checkpoint, so that a resumed run goes on with it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from framestream.pipeline.config.training import EvaluateConfig

logger = logging.getLogger(__name__)


class BestScore:
    """Remembers the best validation. All ranks have the same one, because they see the same scores.

    Args:
        config: names the score and the patience.

    Attributes:
        step: of the last validation, 0 before the first.
        best_step: of the best one, 0 if there is none.
        best: its score.
        stale: validations since then.
        pending: the log record of a step whose validation was interrupted.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._config = config
        self.step, self.scores = 0, dict[str, float | None]()
        self.best_step, self.best, self.stale = 0, math.nan, 0
        self.pending: dict | None = None

    @property
    def is_over(self) -> bool:
        """Whether the run stops because ``evaluate.patience`` validations were not better than the best."""
        return 0 < self._config.patience <= self.stale

    def add(self, step: int, scores: Mapping[str, float]) -> bool:
        """Count a validation; return whether it is the best so far. A score that is not finite never is."""
        self.step = step
        self.scores = {name: value if math.isfinite(value) else None for name, value in scores.items()}
        score = scores.get(self._config.best, math.nan)
        better = score < self.best if self._config.best == "loss" else score > self.best
        if math.isfinite(score) and (better or not self.best_step):
            self.best_step, self.best, self.stale = step, score, 0
            return True
        self.stale += 1
        return False

    def take_pending(self) -> dict | None:
        """Return the log record of the step whose validation was interrupted, None if none was."""
        pending, self.pending = self.pending, None
        # a loss or gradient that was not finite is null in a checkpoint
        unknown = {name: math.nan for name in ("loss", "grad_norm") if pending and pending.get(name) is None}
        return {**pending, **unknown} if pending else None

    def forget(self) -> None:
        """Forget the best validation: the next one is the best."""
        self.best_step, self.best, self.stale = 0, math.nan, 0

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {
            "name": self._config.best,
            "questions": self._config.questions,
            "step": self.step,
            "scores": self.scores,
            "best_step": self.best_step,
            "best": self.best if self.best_step else None,
            "stale": self.stale,
            "pending": self.pending,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore ``state``. The best score of another name, or of other dialogues, is forgotten with a log line."""
        self.step, self.scores, self.pending = state["step"], state["scores"], state["pending"]
        named, now = [(state["name"], state["questions"]), (self._config.best, self._config.questions)]
        if named != now:
            message = "evaluate.best, evaluate.questions: %s before, %s now; the next validation is the best again"
            logger.info(message, named, now)
        elif state["best_step"]:
            self.best_step, self.best, self.stale = state["best_step"], state["best"], state["stale"]
