"""Answer held-out questions with a model, under controls, and summarize the answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.intervals import VideoClock
from framestream.pipeline.evaluation.questions import QuestionSource, count_rejected
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.evaluation.cost_meter import Cost, CostMeter, merge_costs
from framestream.trainer.evaluation.examples import (
    EXAMPLES_PER_FAMILY,
    UNREADABLE,
    first_of_each_family,
    make_examples,
)
from framestream.trainer.evaluation.grounding import (
    GroundingScore,
    read_clock,
    score_replies,
    summarize_grounding,
)
from framestream.trainer.evaluation.metrics import CONTROLS, blind_partners, is_correct, summarize
from framestream.trainer.evaluation.rank_pool import RankPool, single_process
from framestream.trainer.inference.generation import generate_from_prefill, prefill
from framestream.trainer.inference.likelihood import loglikelihood
from framestream.trainer.inference.vision_cache import VisionFeatureCache
from framestream.trainer.weights.load import load_pretrained
from framestream.trainer.weights.runs import trained_frames

MAX_UNITS = 256  #: of work for ranks to take; fewer and larger ones encode fewer videos twice

#: what a prompt is made of: the condition, the question, and the others of its family whose media may be shown blind
Work = tuple[str, int, Sequence[int]]


@dataclass
class Answers:
    """The answers under one condition (``own`` frames, or a control), by number of the question."""

    generated: dict[int, str] = field(default_factory=dict)
    most_likely: dict[int, str] = field(default_factory=dict)  #: of the options, for questions with options

    def by_method(self) -> dict[str, dict[int, str]]:
        """Return the answers of each method, by its name in evaluation.json."""
        return {"generation": self.generated, "likelihood": self.most_likely}


class Evaluator:
    """Answers questions with one model, with their own frames and under ``controls``.

    Args:
        manifest: seed, batch size and longest answer.
        checkpoint: folder of weights.
        questions: what is asked.
        controls: some of :data:`framestream.trainer.evaluation.metrics.CONTROLS`.
        ranks: share the questions. Every rank has a model.

    Attributes:
        answers: by condition: ``own`` and the controls. On rank 0 they are those of all ranks after :meth:`run`.
        unreadable: questions that cannot be shown, by number, with the reason; as ``answers``.
        clocks: of the questions whose answers are intervals, by number; as ``answers``.
        costs: of the prompts, by the questions' cost group; as ``answers``.
    """

    def __init__(
        self,
        manifest: Manifest,
        checkpoint: Path,
        questions: QuestionSource,
        controls: Sequence[str],
        ranks: RankPool,
    ) -> None:
        self._manifest, self._questions, self._ranks = manifest, questions, ranks
        self._model = load_pretrained(checkpoint, manifest.frames.size).to(ranks.device)
        self.answers = {condition: Answers() for condition in ("own", *controls)}
        self.unreadable: dict[int, str] = {}
        self.clocks: dict[int, VideoClock] = {}
        self.costs: dict[str, Cost] = {}
        self._encode = VisionFeatureCache(self._model.vision_tower, ranks.device)
        self._meter = CostMeter(ranks.device)
        self._records: list[tuple[str, int, str, str | None]] = []  # condition, question, generated, most likely
        self._faults: list[tuple[str, int, str]] = []  # condition, question, reason

    def run(self, partners: Mapping[int, Sequence[int]]) -> bool:
        """Answer the questions that are keys of ``partners``, under every condition.

        Args:
            partners: question -> others of its family. Blind, the media of the first that can be shown are shown.
                A question without others is not asked blind.

        Returns:
            whether this is rank 0, which has the answers of all ranks.

        Raises:
            RankFailedError: another rank failed.
        """
        asked = ((condition, i, others) for i, others in partners.items() for condition in self.answers)
        work = [(condition, i, others) for condition, i, others in asked if others or condition != "blind"]
        units = self._units(work)
        hidden = None if self._ranks.is_main else True
        with tqdm(total=len(work), desc="questions", unit="question", dynamic_ncols=True, disable=hidden) as bar:
            for number in self._ranks.take(len(units)):
                # several questions are about one video; a unit knows none of those before it, whoever answers them
                self._encode = VisionFeatureCache(self._model.vision_tower, self._ranks.device)
                for batch in units[number]:
                    with self._meter.measure(self._questions.cost_group(batch[0][1]), len(batch)):
                        self._answer(batch)
                    bar.update(self._ranks.add_done(len(batch)) - bar.n)
            found: dict[str, Any] = {"records": self._records, "faults": self._faults}
            found |= {"clocks": list(self.clocks.items()), "costs": self._meter.to_dict()}
            parts = self._ranks.collect(found, lambda done: bar.update(done - bar.n))
        if parts is None:
            return False
        self._merge(parts, partners)
        return True

    def _units(self, work: Sequence[Work]) -> list[list[list[Work]]]:
        """Divide the work into units of one or more batches, the longest prompts first.

        Batches do not depend on the ranks: the last bits of an answer's logits depend on what else is in its batch.
        Prompts of similar length share a batch, because shorter ones are padded. So do those with the same media, which
        are encoded once.
        """
        lengths, media = [], []
        for condition, i, others in work:
            shown = others[0] if condition == "blind" else i
            lengths.append(self._questions.prompt_length(i, shown) or 0)  # 0 where it is unknown
            media.append(repr(self._questions[shown].media))
        longest: dict[str, int] = {}
        for length, name in zip(lengths, media, strict=True):
            longest[name] = max(length, longest.get(name, 0))
        groups: dict[str, list[Work]] = {}
        for n in sorted(range(len(work)), key=lambda n: (-longest[media[n]], media[n], -lengths[n])):
            groups.setdefault(self._questions.cost_group(work[n][1]), []).append(work[n])
        size = self._manifest.evaluate.batch
        batches = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
        joined = max(1, -(-len(batches) // MAX_UNITS))
        return [batches[start : start + joined] for start in range(0, len(batches), joined)]

    def _merge(self, parts: Sequence[dict], partners: Iterable[int]) -> None:
        """Take over the answers and faults of all ranks, in an order that does not depend on them."""
        faults = {}
        for part in parts:
            for condition, i, generated, most_likely in part["records"]:
                self.answers[condition].generated[i] = generated
                if most_likely is not None:
                    self.answers[condition].most_likely[i] = most_likely
            faults.update({(condition, i): reason for condition, i, reason in part["faults"]})
            self.clocks.update({i: VideoClock(*clock) for i, clock in part["clocks"]})
        self.costs = merge_costs(part["costs"] for part in parts)
        for i in partners:
            if reasons := [faults[condition, i] for condition in self.answers if (condition, i) in faults]:
                self.unreadable[i] = reasons[0]

    def _prompt(self, condition: str, i: int, others: Sequence[int]) -> Batch | None:
        """Build the prompt of question ``i``; None if it cannot be shown."""
        shuffle = np.random.default_rng([self._manifest.seed, i]) if condition == "shuffled" else None
        fault = ""
        for media_of in others if condition == "blind" else (None,):
            try:
                if condition == "own" and (clock := read_clock(self._questions, i)):
                    self.clocks[i] = clock
                return self._questions.prompt(i, media_of, shuffle, self._encode)
            except UNREADABLE as error:
                fault = " ".join(str(error).split())
        if condition == "blind":
            fault = f"the media of {len(others)} other questions cannot be shown; the last: {fault}"
        self._faults.append((condition, i, f"{self._questions[i].key}: {fault}"))
        return None

    def _answer(self, work: Sequence[Work]) -> None:
        """Answer one batch."""
        built = ((condition, i, self._prompt(condition, i, others)) for condition, i, others in work)
        device = self._ranks.device
        prompts = [(condition, i, row.to(device)) for condition, i, row in built if row is not None]
        if not prompts:
            return
        state = prefill(self._model, [row for _, _, row in prompts])
        most_likely: dict[int, str] = {}
        for n, (_, i, _) in enumerate(prompts):
            if options := self._questions[i].options:
                ids = [self._questions.chat_template.answer_ids(option) for option in options]
                logprobs = [found.logprob for found in loglikelihood(self._model, state.select(n), ids)]
                most_likely[n] = options[int(np.argmax(logprobs))]
        keys = [key for _, _, row in prompts for key in row.keys]
        template, longest = self._questions.chat_template, self._manifest.evaluate.max_new_tokens
        outputs = generate_from_prefill(self._model, state, keys, longest, template.end_ids)
        for n, ((condition, i, _), tokens) in enumerate(zip(prompts, outputs, strict=True)):
            text = template.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            self._records.append((condition, i, text, most_likely.get(n)))


def evaluate(
    manifest: Manifest,
    checkpoint: Path,
    questions: QuestionSource,
    limit: int | None = None,
    controls: Sequence[str] = CONTROLS,
    examples: int = EXAMPLES_PER_FAMILY,
    ranks: RankPool | None = None,
    needs_blind: bool = False,
) -> dict | None:
    """Answer every question with its own frames and under ``controls``.

    A family in which no question has a blind partner has no blind control. In other families, questions that have none
    are left out, so that both scores are those of the same questions.

    Args:
        manifest: of the model and the questions.
        checkpoint: folder of weights.
        questions: what is asked.
        limit: questions of each family that are asked, all if None.
        controls: some of :data:`framestream.trainer.evaluation.metrics.CONTROLS`, ``blind`` at least.
        examples: questions of each family that are shown with their frames.
        ranks: share the questions; this process alone answers them if None.
        needs_blind: leave out families that have no blind control.

    Returns:
        the object of evaluation.json on rank 0, None on the others.

    Raises:
        RankFailedError: another rank failed.
        ShardsError: no question can be scored.
        WeightsError: the weights cannot be read.
    """
    usable, misfits = _split_usable(questions)
    chosen = first_of_each_family(questions, usable, limit)
    partners = _choose_partners(questions, usable, chosen, manifest.seed, needs_blind)
    evaluator = Evaluator(manifest, checkpoint, questions, controls, ranks or single_process())
    if not evaluator.run(partners):
        return None
    scored = [i for i in partners if i not in evaluator.unreadable]
    if not scored:
        if left_out := [*evaluator.unreadable.values(), *misfits]:
            raise ShardsError(f"no question can be scored: {count_rejected(left_out)}")
        raise ShardsError(
            "no question can be scored: each needs media, and another question of its family, with another answer and "
            "with media that do not contain what it is about (the blind control)"
        )
    grounded = {
        i: score_replies(questions[i], evaluator.clocks[i], replies)
        for i, replies in ((i, _replies(i, evaluator.answers)) for i in scored if i in evaluator.clocks)
    }
    others = [i for i in scored if i not in grounded]
    own, blind = (evaluator.answers[name].generated for name in ("own", "blind"))
    result = {
        "checkpoint": str(checkpoint),
        "trained_frames": trained_frames(checkpoint) or manifest.frames.max,
        "max_frames": manifest.frames.max,
        "families": _summarize_families(questions, others, evaluator.answers, manifest.seed),
        "grounding": _summarize_grounding(questions, grounded, manifest.seed),
        "not_asked": len(chosen) - len(partners),
        "without_partner": sorted({questions[i].family for i in chosen if i not in partners}),
        "without_blind": sorted({questions[i].family for i in scored if not partners[i]}),
        "too_long": sum(questions.num_answer_tokens(i) > manifest.evaluate.max_new_tokens for i in scored),
        "unreadable": [*questions.rejected, *misfits, *evaluator.unreadable.values()],
        "answers": [_record(questions, i, evaluator.answers, grounded.get(i)) for i in scored],
        "examples": make_examples(questions, scored, own, blind, grounded, examples),
    }
    if evaluator.costs:
        result["costs"] = {group: asdict(cost) for group, cost in evaluator.costs.items()}
    return result


def _split_usable(questions: QuestionSource) -> tuple[list[int], list[str]]:
    """Return the questions that can be scored, and a line for each whose answer is not one of its options."""
    usable, misfits = [], []
    for i in range(len(questions)):
        options, answer = questions[i].options, questions[i].answer
        if options and not any(is_correct(option, answer) for option in options):
            misfits.append(f"{questions[i].key}: the answer {answer!r} is not one of its options, {', '.join(options)}")
        else:
            usable.append(i)
    return usable, misfits


def _choose_partners(
    questions: QuestionSource, usable: Sequence[int], chosen: Sequence[int], seed: int, needs_blind: bool
) -> dict[int, list[int]]:
    """Choose the blind partners of each of ``chosen``; see :func:`evaluate` for questions that have none.

    Partners are any of ``usable``, so a question has the same partners whatever the limit is.
    """
    asked = [questions[i] for i in usable]
    partners = blind_partners(
        [question.family for question in asked],
        [question.answer for question in asked],
        [questions.contents(i) for i in usable],
        seed,
    )
    by_question = {i: [usable[other] for other in others] for i, others in zip(usable, partners, strict=True)}
    compared = {questions[i].family for i, others in by_question.items() if others}
    alone = {i for i in chosen if questions[i].media and questions[i].family not in compared and not needs_blind}
    return {i: by_question[i] for i in chosen if by_question[i] or i in alone}


def _summarize_families(
    questions: QuestionSource, scored: Sequence[int], answers: Mapping[str, Answers], seed: int
) -> list[dict]:
    """Summarize each method and family: one row each, methods first."""
    families = sorted({questions[i].family for i in scored})
    by_condition = {condition: found.by_method() for condition, found in answers.items()}
    rows = []
    for method in by_condition["own"]:
        for family in families:
            members = [i for i in scored if questions[i].family == family and i in by_condition["own"][method]]
            if not members:
                continue
            asked = {name: found[method] for name, found in by_condition.items() if members[0] in found[method]}
            correct = {
                condition: np.array([is_correct(found[i], questions[i].answer) for i in members])
                for condition, found in asked.items()
            }
            controls = {name: correct.get(name) for name in by_condition if name != "own"}
            rows.append(summarize(family, method, correct["own"], controls, seed))
    return rows


def _summarize_grounding(questions: QuestionSource, scores: Mapping[int, GroundingScore], seed: int) -> list[dict]:
    """Summarize the questions whose answers are intervals: one row for each family."""
    by_family: dict[str, list[GroundingScore]] = {}
    for i, score in scores.items():
        by_family.setdefault(questions[i].family, []).append(score)
    return [summarize_grounding(family, found, seed) for family, found in sorted(by_family.items())]


def _replies(i: int, answers: Mapping[str, Answers]) -> dict[str, str | None]:
    """Return the generated answers to a question, by condition; None for a control that its family does not have."""
    return {condition: found.generated.get(i) for condition, found in answers.items()}


def _record(
    questions: QuestionSource, i: int, answers: Mapping[str, Answers], grounding: GroundingScore | None
) -> dict:
    """Return one question with all its answers, as in evaluation.json."""
    question = questions[i]
    record: dict = {
        "key": question.key,
        "family": question.family,
        "question": question.text,
        "expected": question.answer,
    }
    record |= _replies(i, answers)
    if grounding:
        record |= grounding.to_dict()
    if question.options:
        record["likeliest"] = {condition: found.most_likely.get(i) for condition, found in answers.items()}
    return record
