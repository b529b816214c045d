"""TODO."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.evaluation.questions import Questions
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.media.errors import MediaError
from framestream.pipeline.media.jpeg import encode_jpeg
from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.evaluation.metrics import CONTROLS, blind_partners, is_correct, summarize
from framestream.trainer.inference.generate import generate_from_prefill, prefill
from framestream.trainer.inference.loglikelihood import loglikelihood
from framestream.trainer.inference.vision_cache import VisionFeatureCache
from framestream.trainer.weights.load import load_pretrained

EXAMPLES_PER_FAMILY = 3  #: questions of each family shown with their frames

EXAMPLE_FRAMES = 16  #: frames of an example


@dataclass
class Answers:
    """What was answered in one way, by question."""

    generated: dict[int, str] = field(default_factory=dict)
    most_likely: dict[int, str] = field(default_factory=dict)  #: of the options, where there are some


class Evaluator:
    """Answers questions with one model, with their own frames and under ``controls``; a question that cannot be shown
    is left out, with the reason."""

    def __init__(self, manifest: Manifest, checkpoint: Path, questions: Questions, controls: Sequence[str]) -> None:
        self._manifest, self._questions = manifest, questions
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_pretrained(checkpoint, manifest.frames.size).to(self._device)
        self._model.encode = VisionFeatureCache(self._model.encode)  # several questions are about one video
        self._tokenizer = questions.chat_template.tokenizer
        self.answers = {way: Answers() for way in ("own", *controls)}
        self.unreadable: dict[int, str] = {}

    def run(self, partners: Mapping[int, Sequence[int]]) -> None:
        """Answer the questions that have ``partners``, blind with the media of the first that can be shown."""
        work = [(way, i, others) for i, others in partners.items() for way in self.answers]
        lengths = [self._questions.prompt_length(i, others[0] if way == "blind" else i) for way, i, others in work]
        order, size = sorted(range(len(work)), key=lengths.__getitem__), self._manifest.evaluate.batch
        with tqdm(total=len(work), desc="questions", unit="question", dynamic_ncols=True, disable=None) as bar:
            for at in range(0, len(order), size):
                self._answer([work[n] for n in order[at : at + size]])
                bar.update(len(order[at : at + size]))

    def _prompt(self, way: str, i: int, others: Sequence[int]) -> Batch | None:
        """The question as ``way`` shows it; None where it cannot be shown."""
        shuffle = np.random.default_rng([self._manifest.seed, i]) if way == "shuffled" else None
        fault = ""
        for media_of in others if way == "blind" else (None,):
            try:
                return self._questions.prompt(i, media_of, shuffle)
            except (OSError, ValueError, MediaError) as error:
                fault = " ".join(str(error).split())
        if way == "blind":
            fault = f"none of {len(others)} others can be shown in its place: {fault}"
        self.unreadable.setdefault(i, f"{self._questions[i].key}: {fault}")
        return None

    def _answer(self, work: list[tuple[str, int, Sequence[int]]]) -> None:
        made = ((way, i, self._prompt(way, i, others)) for way, i, others in work)
        prompts = [(way, i, row.to(self._device)) for way, i, row in made if row is not None]
        if not prompts:
            return
        read = prefill(self._model, [row for _, _, row in prompts])
        for n, (way, i, _) in enumerate(prompts):
            if options := self._questions[i].options:
                ids = [self._questions.chat_template.answer_ids(option) for option in options]
                found = [likelihood.log for likelihood in loglikelihood(self._model, read.select(n), ids)]
                self.answers[way].most_likely[i] = options[int(np.argmax(found))]
        keys = [key for _, _, row in prompts for key in row.keys]
        longest, end = self._manifest.evaluate.max_new_tokens, self._tokenizer.eos_token_id
        outputs = generate_from_prefill(self._model, read, keys, longest, end)
        for (way, i, _), tokens in zip(prompts, outputs, strict=True):
            self.answers[way].generated[i] = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()


def evaluate(
    manifest: Manifest,
    checkpoint: Path,
    questions: Questions,
    limit: int | None = None,
    controls: Sequence[str] = CONTROLS,
    examples: int = EXAMPLES_PER_FAMILY,
) -> dict:
    """Answer every question with its own frames and under ``controls``; returns what evaluation.json holds.

    Args:
        limit: questions of each family that are asked, all if None.
        controls: some of :data:`framestream.trainer.evaluation.metrics.CONTROLS`, ``blind`` at least.
        examples: questions of each family that are shown with their frames.

    Raises:
        ShardsError: no question can be scored.
        WeightsError: the weights cannot be read.
    """
    fit, misfits = _fit(questions)
    families, answers = [questions[i].family for i in fit], [questions[i].answer for i in fit]
    partners = blind_partners(families, answers, [len(questions[i].media) for i in fit], manifest.seed)
    found = {i: [fit[other] for other in others] for i, others in zip(fit, partners, strict=True)}
    chosen = _first(questions, fit, limit)
    pairs = {i: found[i] for i in chosen if found[i]}
    scorer = Evaluator(manifest, checkpoint, questions, controls)
    scorer.run(pairs)
    asked = [i for i in pairs if i not in scorer.unreadable]
    if not asked:
        why = next(iter(scorer.unreadable.values()), "none has a partner of its family with another answer")
        raise ShardsError(f"no question can be scored: {why}")
    rows = []
    for method, named in (("generation", "given"), ("likelihood", "likeliest")):
        found = {way: getattr(answered, named) for way, answered in scorer.answers.items()}
        for family in sorted({questions[i].family for i in asked}):
            members = [i for i in asked if questions[i].family == family and i in found["own"]]
            if members:
                right = {
                    way: np.array([is_correct(f[i], questions[i].answer) for i in members]) for way, f in found.items()
                }
                rows.append(summarize(family, method, right.pop("own"), right, manifest.seed))
    return {
        "checkpoint": str(checkpoint),
        "families": rows,
        "without_partner": sorted({questions[i].family for i in chosen if i not in pairs}),
        "too_long": sum(questions.answer_tokens(i) > manifest.evaluate.max_new_tokens for i in asked),
        "unreadable": [*questions.rejected, *misfits, *scorer.unreadable.values()],
        "answers": [_record(questions, i, scorer.answers) for i in asked],
        "examples": _examples(questions, asked, scorer.answers, examples),
    }


def _fit(questions: Questions) -> tuple[list[int], list[str]]:
    """Questions that can be scored, and a line for each whose answer is none of its options."""
    fit, misfits = [], []
    for i in range(len(questions)):
        options, answer = questions[i].options, questions[i].answer
        if options and not any(is_correct(option, answer) for option in options):
            misfits.append(f"{questions[i].key}: the answer {answer!r} is none of its options, {', '.join(options)}")
        else:
            fit.append(i)
    return fit, misfits


def _first(questions: Questions, fit: Sequence[int], limit: int | None) -> list[int]:
    """Those of ``fit``, or the first ``limit`` of each family."""
    counts: dict[str, int] = {}
    chosen = []
    for i in fit:
        family = questions[i].family
        counts[family] = counts.get(family, 0) + 1
        if limit is None or counts[family] <= limit:
            chosen.append(i)
    return chosen


def _record(questions: Questions, i: int, answers: dict[str, Answers]) -> dict:
    """One question with all its answers."""
    asked = questions[i]
    record = {"key": asked.key, "family": asked.family, "question": asked.text, "expected": asked.answer}
    record |= {way: answered.generated[i] for way, answered in answers.items()}
    if asked.options:
        record["likeliest"] = {way: answered.most_likely[i] for way, answered in answers.items()}
    return record


def _examples(questions: Questions, asked: Sequence[int], answers: dict[str, Answers], most: int) -> list[dict]:
    """The first ``most`` questions of each family with their frames."""
    shown: dict[str, int] = {}
    examples = []
    for i in asked:
        family = questions[i].family
        shown[family] = shown.get(family, 0) + 1
        if shown[family] > most:
            continue
        row = questions.prompt(i)
        frames = [*row.clips.flatten(0, 1).numpy(), *row.image_tiles.numpy()]
        picked = [frames[n] for n in np.linspace(0, len(frames) - 1, min(len(frames), EXAMPLE_FRAMES)).round().astype(int)]
        jpegs = [base64.b64encode(encode_jpeg(frame, 85, "420")).decode("ascii") for frame in picked]
        own, blind = (answers[way].generated[i] for way in ("own", "blind"))
        example = {"family": family, "question": questions[i].text, "expected": questions[i].answer}
        examples.append({**example, "given": own, "blind_given": blind, "frames_jpeg": jpegs})
    return examples
