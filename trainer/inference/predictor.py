"""A trained model that is asked about files: from paths and turns to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.media_view import MediaView
from framestream.pipeline.shards.memory_index import MediaFile, MediaFileCache
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.trainer.inference.generate import GREEDY, Sampling, generate, prefill
from framestream.trainer.inference.loglikelihood import LogLikelihood, loglikelihood
from framestream.trainer.weights.load import load_pretrained
from framestream.trainer.weights.runs import resolve_weights
from framestream.trainer.weights.tensor_files import WeightsError


def resolve_run(
    checkpoint: str | Path, manifest: str | Path | None, overrides: Sequence[str] = ()
) -> tuple[Path, Manifest]:
    """The folder of weights and the manifest of a run, of its ``final``, or of an exported checkpoint.

    Raises:
        WeightsError: there are no weights, or no manifest beside them.
        ManifestError: the manifest is faulty.
    """
    weights = resolve_weights(checkpoint)
    beside = [weights.parent / "manifest.yaml", weights / "manifest.yaml"]
    found = manifest or next((path for path in beside if path.is_file()), None)
    if found is None:
        raise WeightsError(f"{checkpoint}: no manifest.yaml beside the weights; name the stage's manifest, too")
    return weights, load_manifest(found, tuple(overrides))


class Predictor:
    """One model under one manifest, on the GPU if there is one."""

    def __init__(self, weights: Path, manifest: Manifest) -> None:
        self.chat_template = build_chat_template(manifest)
        self.tokenizer = self.chat_template.tokenizer
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = load_pretrained(weights, manifest.frames.size).to(self.device)
        self._manifest = manifest
        self._handfuls = MediaFileCache(manifest)

    def build_prompt(self, turns: Sequence[dict], files: Sequence[MediaFile], key: str = "") -> Batch:
        """The row of ``turns``, which end with a question and have a mark for each of ``files``.

        Raises:
            MediaError: a file cannot be used; one line that names it.
            ValueError: marks and files do not fit, or the model takes fewer tokens.
        """
        prompts = PromptBuilder(self._manifest, self._handfuls.media_views(files), self.chat_template)
        return prompts.build(turns, range(len(files)), key).to(self.device)

    def media_views(self, files: Sequence[MediaFile]) -> list[MediaView]:
        """What is shown of ``files``."""
        return self._handfuls.media_views(files).views(list(range(len(files))))

    def frame_times(self, files: Sequence[MediaFile], view: MediaView) -> list[float]:
        """Seconds of the source at which the frames of a video's view were shown."""
        stored = self._handfuls.media_views(files).index.media["timestamps"][view.row].as_py()
        return [stored[place] for place in view.frame_indices]

    def answer(self, prompts: Sequence[Batch], max_new_tokens: int, sampling: Sampling = GREEDY) -> list[str]:
        """The answers to ``prompts``, of one question each."""
        tokens = generate(self.model, prompts, max_new_tokens, self.tokenizer.eos_token_id, sampling)
        return [self.decode(ids) for ids in tokens]

    def loglikelihoods(self, prompt: Batch, answers: Sequence[str]) -> list[LogLikelihood]:
        """How likely each of ``answers`` is, with the token that ends it."""
        read = prefill(self.model, [prompt])
        return loglikelihood(self.model, read, [self.chat_template.answer_ids(answer) for answer in answers])

    def decode(self, ids: Sequence[int]) -> str:
        """Tokens of an answer as text."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
