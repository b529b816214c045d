"""Validation while training (``evaluate.every``): loss and scores on held-out dialogues, between two optimizer steps.

Dialogue number i is run alone by rank i modulo the number of ranks. So its loss and its answers do not depend on what
other ranks do. The figures of all dialogues are added in their order, in float64. So the scores do not depend on the
number of ranks or on the ZeRO stage. Nothing draws random numbers, and the training loader is not touched.

    loss          cross entropy for each labeled token
    accuracy      correct answers by greedy generation, in percent of the questions whose answer is short enough for it
    likelihood    questions with options whose most likely option is correct, in percent
    miou          mean IoU of the generated answers to questions about an interval of time, in percent
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from framestream.pipeline.config.manifest import Manifest, ManifestError
from framestream.pipeline.evaluation.held_out import HeldOutDialogues, HeldOutRow, empty_row
from framestream.pipeline.evaluation.intervals import VideoClock
from framestream.pipeline.evaluation.questions import Question
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.planning.dataset import ConcatDataset
from framestream.pipeline.utils.daemon_pool import DaemonThreadPool
from framestream.trainer.checkpoint.state import checkpoint_name
from framestream.trainer.distributed.preemption import PreemptionHandler
from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_sum, broadcast_object
from framestream.trainer.distributed.watchdog import Watchdog
from framestream.trainer.evaluation.grounding import asks_for_interval, score_replies
from framestream.trainer.evaluation.metrics import is_correct
from framestream.trainer.monitoring.device import peak_memory
from framestream.trainer.monitoring.logger import finite_or_none
from framestream.trainer.monitoring.run_ledger import RunLedger, read_run_ledger
from framestream.trainer.training.best_score import BestScore
from framestream.trainer.training.engine import TrainingEngine
from framestream.trainer.training.lockstep import LockstepModel

UNREADABLE = (OSError, ValueError, MediaError)  #: errors of one dialogue; it is left out of this validation

logger = logging.getLogger(__name__)


class AskedQuestion(NamedTuple):
    """A held-out question whose answer can be checked."""

    question: Question
    options: list[list[int]]  #: token ids of each of its options
    is_generated: bool  #: its answer is at most ``evaluate.max_new_tokens`` long


class RowFigures(NamedTuple):
    """What the rank that runs a dialogue knows about it. Zeros on the other ranks, so that they can be added up."""

    read: float = 0.0  #: 1 if its media could be read
    loss: float = 0.0  #: sum over its labeled tokens
    tokens: float = 0.0  #: labeled tokens
    generated: float = 0.0  #: 1 if an answer was generated
    generated_correct: float = 0.0
    compared: float = 0.0  #: 1 if options were compared
    compared_correct: float = 0.0
    grounded: float = 0.0  #: 1 if the generated answer is an interval of time
    iou: float = 0.0


class Validation:
    """The validations of one run. Every rank has one and calls the same methods.

    Args:
        manifest: with ``evaluate.every``.
        dataset: the dialogues of all splits that the run reads.
        context: this rank.
        ledger: gets the dialogues that cannot be read, each once in a run.

    Attributes:
        best: the best validation so far.

    Raises:
        ShardsError: there are no held-out dialogues.
        ManifestError: they do not have the score that ``evaluate.best`` names.
    """

    def __init__(
        self, manifest: Manifest, dataset: ConcatDataset, context: DistributedContext, ledger: RunLedger
    ) -> None:
        self._manifest, self._context, self._ledger = manifest, context, ledger
        self._dialogues = HeldOutDialogues(manifest, dataset, manifest.evaluate.questions)
        self._asked = [self._ask(question) for question in self._dialogues.questions]
        self.best = BestScore(manifest.evaluate)
        self._check_score()

    def is_due(self, step: int, steps: int) -> bool:
        """Whether the run is validated after optimizer step ``step`` of ``steps``."""
        return step % self._manifest.evaluate.every == 0 or step == steps

    def needs_checkpoint(self, step: int) -> bool:
        """Whether step ``step`` is the best one, or the one that the run stops at."""
        return self.best.best_step == step or self.best.is_over

    def resume(self, state: dict, checkpoints: Path) -> None:
        """Restore the state that a checkpoint has, and check that the checkpoint of its best step is there."""
        self.best.load_state_dict(state)
        folder = checkpoints / checkpoint_name(self.best.best_step)
        found = (folder / "state.json").exists() if self._context.is_main else None
        if self.best.best_step and not broadcast_object(found, self._context):
            self.best.forget()
            if self._context.is_main:
                logger.warning("%s: the best checkpoint is gone; the next validation is the best", folder)

    def run(
        self, engine: TrainingEngine, record: dict, watchdog: Watchdog, preemption: PreemptionHandler
    ) -> dict[str, Any]:
        """Validate the weights of a step, and compare its scores with the best ones.

        Args:
            engine: of the model.
            record: the log record of the step, kept for the resumed run if this one is asked to stop.
            watchdog: is told what this rank does.
            preemption: asked before each dialogue.

        Returns:
            the figures for the log.

        Raises:
            Preempted: the run is asked to stop.
        """
        started, step = time.perf_counter(), record["step"]
        self.best.pending = {name: finite_or_none(value) for name, value in record.items()}
        modes = [(module, module.training) for module in engine.module.modules()]
        engine.module.eval()
        try:
            rows = self._run_rows(engine, step, watchdog, preemption)
        finally:
            for module, mode in modes:
                module.training = mode
        if release := getattr(engine.optimizer, "empty_partition_cache", None):
            release()  # under ZeRO-3: parameters that the last call kept for a backward pass
        peak_memory(self._context.device)  # the next step counts its own
        self.best.pending = None
        scores = summarize_rows(rows)
        is_best = self.best.add(step, scores)
        read = sum(int(row.read) for row in rows)
        self._log(step, scores, read, is_best)
        return {
            **{f"val_{name}": value for name, value in scores.items()},
            "val_families": self._family_accuracy(rows),
            "val_dialogues": read,
            "val_unreadable": len(rows) - read,
            "val_seconds": time.perf_counter() - started,
            "val_best": self.best.best if self.best.best_step else None,
            "val_best_step": self.best.best_step or None,
        }

    def describe(self) -> str:
        """Say in one line what is validated."""
        count, asked = len(self._dialogues), sum(each is not None for each in self._asked)
        every = f"every {self._manifest.evaluate.every:,} optimizer steps"
        return f"validation {every}: {count:,} held-out dialogues, {asked:,} of them with an answer that is checked"

    def describe_stop(self, step: int, steps: int) -> str:
        """Say in one line why the run stops, at its last step or before it."""
        best, name = self.best, self._manifest.evaluate.best
        checkpoint = f"{self._manifest.output}/checkpoints/{checkpoint_name(best.best_step)}"
        kept = f"the best, {show_scores({name: best.best})}, is {checkpoint}" if best.best_step else "none was finite"
        stale = f"{best.stale} validation{'s' * (best.stale != 1)}"
        end = f"stopped early after step {step} of {steps}, because"
        if step >= steps:
            end = f"ended with the last step, {step:,};"
        return f"{end} {stale} had no better {name} (evaluate.patience: {self._manifest.evaluate.patience}); {kept}"

    # ---------------------------------------------------------------------------------------------------- questions

    def _ask(self, question: Question | None) -> AskedQuestion | None:
        """Decide how a question is asked; None if its answer cannot be checked."""
        if question is None:
            return None
        template, options = self._dialogues.chat_template, question.options
        if options and not any(is_correct(option, question.answer) for option in options):
            return None
        length = len(template.answer_ids(question.answer)) - 1  # without the end token
        is_generated = length <= self._manifest.evaluate.max_new_tokens
        if not options and not is_generated:
            return None
        return AskedQuestion(question, [template.answer_ids(option) for option in options], is_generated)

    def _check_score(self) -> None:
        name, asked = self._manifest.evaluate.best, [each for each in self._asked if each]
        generated = [asks_for_interval(each.question) for each in asked if each.is_generated]
        has = {
            "loss": True,
            "accuracy": not all(generated),
            "likelihood": any(each.options for each in asked),
            "miou": any(generated),
        }
        if not has[name]:
            short = "of at most evaluate.max_new_tokens tokens"
            kinds = {"likelihood": "options", "miou": f"an interval as its answer, {short}"}
            needs = kinds.get(name, f"an answer {short}")
            known = " or ".join(known for known, there in has.items() if there)
            raise ManifestError(f"evaluate.best: {name}: no held-out question has {needs}; choose {known}")

    # --------------------------------------------------------------------------------------------------------- rows

    def _run_rows(
        self, engine: TrainingEngine, step: int, watchdog: Watchdog, preemption: PreemptionHandler
    ) -> list[RowFigures]:
        """Run all dialogues; return their figures, the same on every rank."""
        context, count = self._context, len(self._dialogues)
        model = LockstepModel(engine.module, context, empty_row(self._manifest.frames).to(context.device))
        figures = [RowFigures()] * count
        with DaemonThreadPool(1) as reader:
            own = self._read_ahead(reader, range(context.rank, count, context.world))
            for first in range(0, count, context.world):
                preemption.raise_if_preempted(context)
                watchdog.set_phase(f"validation after step {step}, dialogue {first + 1} of {count}")
                i, asked = first + context.rank, self._asked[first : first + context.world]
                own_question = self._asked[i] if i < count else None
                found = self._run_row(model, next(own, None), own_question, [each for each in asked if each])
                if i < count:
                    figures[i] = found
        numbers = all_reduce_sum([value for row in figures for value in row], context)
        width = len(RowFigures._fields)
        return [RowFigures(*numbers[start : start + width]) for start in range(0, len(numbers), width)]

    def _read_ahead(self, reader: DaemonThreadPool, own: range) -> Iterator[HeldOutRow | None]:
        """Yield the dialogues of this rank, None for those that cannot be read; the next one is read meanwhile."""
        waiting = [reader.submit(self._read, i) for i in own[:1]]
        for n in range(len(own)):
            found = waiting.pop().result()
            waiting += [reader.submit(self._read, i) for i in own[n + 1 : n + 2]]
            yield found

    def _read(self, i: int) -> HeldOutRow | None:
        try:
            return self._dialogues.read(i)
        except UNREADABLE as error:
            key, reason = self._dialogues.keys[i], " ".join(str(error).split())
        logger.warning("%s: left out of the validation (%s)", key, reason)
        noted = (row for row in read_run_ledger(self._ledger.folder.parent) if row["epoch"] is None)
        if not any((row["key"], row["reason"]) == (key, "unreadable") for row in noted):
            self._ledger.record([(key, reason)], None, None)
        return None

    def _run_row(
        self, model: LockstepModel, found: HeldOutRow | None, asked: AskedQuestion | None, together: list[AskedQuestion]
    ) -> RowFigures:
        """Run a dialogue of this rank, while the other ranks run theirs.

        Args:
            model: that all ranks call together.
            found: the dialogue; None if there is none, or it cannot be read.
            asked: its question; None if there is none.
            together: the questions of all ranks.
        """
        figures, device = RowFigures(), self._context.device
        loss = model.loss(found.row.to(device) if found else None)
        if found:
            figures = figures._replace(read=1.0, loss=loss, tokens=float(len(found.row.label_positions)))
        if not together:
            return figures
        prompt = found.prompt.to(device) if found and found.prompt and asked else None
        options = asked.options if asked and prompt else []
        longest = max(self._manifest.evaluate.max_new_tokens * each.is_generated for each in together)
        compare, template = any(each.options for each in together), self._dialogues.chat_template
        tokens, logprobs = model.answer(prompt, options, compare, longest, template.end_ids)
        if asked is None or prompt is None:
            return figures
        answer = asked.question.answer
        if asked.is_generated:
            text = template.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            figures = _judge(figures, asked.question, text, found.clock if found else None)
        if options:
            likely = asked.question.options[logprobs.index(max(logprobs))]
            figures = figures._replace(compared=1.0, compared_correct=float(is_correct(likely, answer)))
        return figures

    def _family_accuracy(self, rows: list[RowFigures]) -> dict[str, float]:
        """Compute the accuracy of generated answers of each family, in percent."""
        families: dict[str, list[RowFigures]] = {}
        for asked, row in zip(self._asked, rows, strict=True):
            if asked and row.generated:
                families.setdefault(asked.question.family, []).append(row)
        return {family: summarize_rows(found)["accuracy"] for family, found in sorted(families.items())}

    def _log(self, step: int, scores: dict[str, float], read: int, is_best: bool) -> None:
        best = "the best so far" if is_best else f"the best was step {self.best.best_step}"
        logger.info(
            "%s: validation after step %d: %s, of %d dialogues; %s",
            *(self._manifest.name, step, show_scores(scores), read, best),
        )


def _judge(figures: RowFigures, question: Question, reply: str, clock: VideoClock | None) -> RowFigures:
    """Add whether a generated answer is correct, or the IoU of one that is an interval."""
    if not asks_for_interval(question) or (clock is None and not question.intervals):
        return figures._replace(generated=1.0, generated_correct=float(is_correct(reply, question.answer)))
    if clock is None or (question.intervals and not any(map(clock.crop, question.intervals))):
        return figures  # nothing of the intervals is shown
    return figures._replace(grounded=1.0, iou=score_replies(question, clock, {"own": reply}).ious["own"])


def show_scores(scores: Mapping[str, float]) -> str:
    """Format scores for a log line: ``loss 1.2345, accuracy 56.2 %``."""
    shown = (f"{value:.4f}" if name == "loss" else f"{value:.1f} %" for name, value in scores.items())
    return ", ".join(f"{name} {value}" for name, value in zip(scores, shown, strict=True))


def summarize_rows(rows: list[RowFigures]) -> dict[str, float]:
    """Compute the scores from the figures of all dialogues, in their order."""
    totals = RowFigures(*(sum(column) for column in zip(*rows, strict=True)))
    scores = {"loss": totals.loss / totals.tokens if totals.tokens else float("nan")}
    if totals.generated:
        scores["accuracy"] = 100 * totals.generated_correct / totals.generated
    if totals.compared:
        scores["likelihood"] = 100 * totals.compared_correct / totals.compared
    if totals.grounded:
        scores["miou"] = 100 * totals.iou / totals.grounded
    return scores
