"""Answer held-out questions with a model, under controls, and summarize the answers."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.questions import QuestionSource
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.evaluation.metrics import CONTROLS, blind_partners, is_correct, summarize
from framestream.trainer.inference.generation import generate_from_prefill, prefill
from framestream.trainer.inference.likelihood import loglikelihood
from framestream.trainer.inference.vision_cache import VisionFeatureCache
from framestream.trainer.weights.load import load_pretrained

EXAMPLES_PER_FAMILY = 3  #: questions that are shown with their frames
EXAMPLE_FRAMES = 16  #: most frames of an example
UNREADABLE = (OSError, ValueError, MediaError)  #: errors of one question's media or text; the question is left out


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

    Attributes:
        answers: by condition: ``own`` and the controls.
        unreadable: questions that cannot be shown, by number, with the reason.
    """

    def __init__(
        self, manifest: Manifest, checkpoint: Path, questions: QuestionSource, controls: Sequence[str]
    ) -> None:
        self._manifest, self._questions = manifest, questions
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_pretrained(checkpoint, manifest.frames.size).to(self._device)
        self._model.vision_cache = VisionFeatureCache(self._model.vision_tower)  # several questions are about one video
        self.answers = {condition: Answers() for condition in ("own", *controls)}
        self.unreadable: dict[int, str] = {}

    def run(self, partners: Mapping[int, Sequence[int]]) -> None:
        """Answer the questions that are keys of ``partners``, under every condition.

        Args:
            partners: question -> others of its family. Blind, the media of the first that can be shown are shown.
        """
        work = [(condition, i, others) for i, others in partners.items() for condition in self.answers]
        lengths = [
            self._questions.prompt_length(i, others[0] if condition == "blind" else i) or 0  # 0 where it is unknown
            for condition, i, others in work
        ]
        # prompts of similar length share a batch, because shorter ones are padded
        order, size = sorted(range(len(work)), key=lengths.__getitem__), self._manifest.evaluate.batch
        with tqdm(total=len(work), desc="questions", unit="question", dynamic_ncols=True, disable=None) as bar:
            for start in range(0, len(order), size):
                self._answer([work[n] for n in order[start : start + size]])
                bar.update(len(order[start : start + size]))

    def _prompt(self, condition: str, i: int, others: Sequence[int]) -> Batch | None:
        """Build the prompt of question ``i``; None if it cannot be shown."""
        shuffle = np.random.default_rng([self._manifest.seed, i]) if condition == "shuffled" else None
        fault = ""
        for media_of in others if condition == "blind" else (None,):
            try:
                return self._questions.prompt(i, media_of, shuffle)
            except UNREADABLE as error:
                fault = " ".join(str(error).split())
        if condition == "blind":
            fault = f"the media of {len(others)} other questions cannot be shown; the last: {fault}"
        self.unreadable.setdefault(i, f"{self._questions[i].key}: {fault}")
        return None

    def _answer(self, work: list[tuple[str, int, Sequence[int]]]) -> None:
        """Answer one batch of (condition, question, others)."""
        built = ((condition, i, self._prompt(condition, i, others)) for condition, i, others in work)
        prompts = [(condition, i, row.to(self._device)) for condition, i, row in built if row is not None]
        if not prompts:
            return
        state = prefill(self._model, [row for _, _, row in prompts])
        for n, (condition, i, _) in enumerate(prompts):
            if options := self._questions[i].options:
                ids = [self._questions.chat_template.answer_ids(option) for option in options]
                logprobs = [found.logprob for found in loglikelihood(self._model, state.select(n), ids)]
                self.answers[condition].most_likely[i] = options[int(np.argmax(logprobs))]
        keys = [key for _, _, row in prompts for key in row.keys]
        template, longest = self._questions.chat_template, self._manifest.evaluate.max_new_tokens
        outputs = generate_from_prefill(self._model, state, keys, longest, template.end_ids)
        for (condition, i, _), tokens in zip(prompts, outputs, strict=True):
            self.answers[condition].generated[i] = template.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def evaluate(
    manifest: Manifest,
    checkpoint: Path,
    questions: QuestionSource,
    limit: int | None = None,
    controls: Sequence[str] = CONTROLS,
    examples: int = EXAMPLES_PER_FAMILY,
) -> dict:
    """Answer every question with its own frames and under ``controls``.

    Args:
        manifest: of the model and the questions.
        checkpoint: folder of weights.
        questions: what is asked.
        limit: questions of each family that are asked, all if None.
        controls: some of :data:`framestream.trainer.evaluation.metrics.CONTROLS`, ``blind`` at least.
        examples: questions of each family that are shown with their frames.

    Returns:
        the object of evaluation.json.

    Raises:
        ShardsError: no question can be scored.
        WeightsError: the weights cannot be read.
    """
    usable, misfits = _split_usable(questions)
    chosen = _first_of_each_family(questions, usable, limit)
    partners = _choose_partners(questions, usable, chosen, manifest.seed)
    evaluator = Evaluator(manifest, checkpoint, questions, controls)
    evaluator.run(partners)
    scored = [i for i in partners if i not in evaluator.unreadable]
    if not scored:
        why = next(iter(evaluator.unreadable.values()), "none has a partner of its family with another answer")
        raise ShardsError(f"no question can be scored: {why}")
    return {
        "checkpoint": str(checkpoint),
        "families": _summarize_families(questions, scored, evaluator.answers, manifest.seed),
        "without_partner": sorted({questions[i].family for i in chosen if i not in partners}),
        "too_long": sum(questions.num_answer_tokens(i) > manifest.evaluate.max_new_tokens for i in scored),
        "unreadable": [*questions.rejected, *misfits, *evaluator.unreadable.values()],
        "answers": [_record(questions, i, evaluator.answers) for i in scored],
        "examples": _examples(questions, scored, evaluator.answers, examples),
    }


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


def _first_of_each_family(questions: QuestionSource, usable: Sequence[int], limit: int | None) -> list[int]:
    """Return the first ``limit`` questions of each family, all if None."""
    counts: dict[str, int] = {}
    chosen = []
    for i in usable:
        family = questions[i].family
        counts[family] = counts.get(family, 0) + 1
        if limit is None or counts[family] <= limit:
            chosen.append(i)
    return chosen


def _choose_partners(
    questions: QuestionSource, usable: Sequence[int], chosen: Sequence[int], seed: int
) -> dict[int, list[int]]:
    """Choose the blind partners of each of ``chosen``; questions that have none are left out.

    Partners are any of ``usable``, so a question has the same partners whatever the limit is.
    """
    asked = [questions[i] for i in usable]
    partners = blind_partners(
        [question.family for question in asked],
        [question.answer for question in asked],
        [len(question.media) for question in asked],
        seed,
    )
    by_question = {i: [usable[other] for other in others] for i, others in zip(usable, partners, strict=True)}
    return {i: by_question[i] for i in chosen if by_question[i]}


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
            correct = {
                condition: np.array([is_correct(found[method][i], questions[i].answer) for i in members])
                for condition, found in by_condition.items()
            }
            rows.append(summarize(family, method, correct.pop("own"), correct, seed))
    return rows


def _record(questions: QuestionSource, i: int, answers: Mapping[str, Answers]) -> dict:
    """Return one question with all its answers, as in evaluation.json."""
    question = questions[i]
    record: dict = {
        "key": question.key,
        "family": question.family,
        "question": question.text,
        "expected": question.answer,
    }
    record |= {condition: found.generated[i] for condition, found in answers.items()}
    if question.options:
        record["likeliest"] = {condition: found.most_likely[i] for condition, found in answers.items()}
    return record


def _examples(
    questions: QuestionSource, scored: Sequence[int], answers: Mapping[str, Answers], limit: int
) -> list[dict]:
    """Return the first ``limit`` questions of each family with their frames, as in evaluation.json."""
    shown = []
    for i in _first_of_each_family(questions, scored, limit):
        with contextlib.suppress(*UNREADABLE):  # a file that changed since it was asked about
            shown.append(_example(questions, i, answers))
    return shown


def _example(questions: QuestionSource, i: int, answers: Mapping[str, Answers]) -> dict:
    """Return one question with its answers and at most ``EXAMPLE_FRAMES`` of its frames, evenly spread."""
    row = questions.prompt(i)
    frames = [*row.clips.flatten(0, 1).numpy(), *row.image_tiles.numpy()]
    chosen = np.linspace(0, len(frames) - 1, min(len(frames), EXAMPLE_FRAMES)).round().astype(int)
    jpegs = [base64.b64encode(encode_jpeg(frames[n], 85, "420")).decode("ascii") for n in chosen]
    return {
        "family": questions[i].family,
        "question": questions[i].text,
        "expected": questions[i].answer,
        "given": answers["own"].generated[i],
        "blind_given": answers["blind"].generated[i],
        "frames_jpeg": jpegs,
    }
