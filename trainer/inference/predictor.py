"""Load a trained model and ask it about files: from paths and turns to text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.evaluation.pixel_stream import Encode
from framestream.pipeline.evaluation.prompts import PromptBuilder
from framestream.pipeline.loading.batch import Batch
from framestream.pipeline.shards.media_view import MediaView
from framestream.pipeline.shards.memory_index import MediaFile, MediaFileCache
from framestream.pipeline.tokenization.chat_template import build_chat_template
from framestream.pipeline.utils.paths import expand_path
from framestream.trainer.inference.device import select_device
from framestream.trainer.inference.generation import GREEDY, Sampling, generate, prefill
from framestream.trainer.inference.likelihood import LogLikelihood, loglikelihood
from framestream.trainer.inference.vision_stream import StreamEncoder
from framestream.trainer.weights.load import load_pretrained
from framestream.trainer.weights.runs import (
    locate_paths,
    resolve_weights,
    stored_manifest,
    warn_of_frame_size,
)
from framestream.trainer.weights.tensor_files import WeightsError


def resolve_run(
    checkpoint: str | Path, manifest: str | Path | None = None, overrides: Sequence[str] = ()
) -> tuple[Path, Manifest]:
    """Find the folder of weights and the manifest of ``checkpoint``.

    A warning is logged if the manifest's frames have another size than those of the weights.

    Args:
        checkpoint: a run, its ``final`` folder, or an exported checkpoint.
        manifest: the stage's YAML; the ``manifest.yaml`` beside or in the folder of weights if None. Its relative
            paths may be relative to any folder above it.
        overrides: ``field=value`` each, such as ``frames.max=64``.

    Raises:
        WeightsError: there are no weights, or no manifest beside them.
        ManifestError: the manifest or config.json is faulty.
    """
    weights = resolve_weights(checkpoint)
    found = manifest or stored_manifest(weights)
    if found is None:
        example = "such as --manifest RUN/manifest.yaml"
        raise WeightsError(
            f"{checkpoint}: no manifest.yaml beside the weights; name the stage's manifest, too, {example}"
        )
    settings = load_manifest(found, tuple(overrides), stored=manifest is None)
    warn_of_frame_size(weights, settings)
    return weights, locate_paths(settings, Path(expand_path(str(found))))


class Predictor:
    """A trained model under one manifest, on the GPU numbered ``LOCAL_RANK`` (0 by default) if there is one.

    Args:
        weights: folder of weights, as :func:`resolve_run` finds it.
        manifest: how files are sampled, resized and put into words.

    Attributes:
        model: the model, in eval mode.
        tokenizer: its Hugging Face tokenizer.
        chat_template: from turns to token ids.
        device: where the model runs.
        encode: computes the tokens of media. Set a :class:`.vision_cache.VisionFeatureCache` to keep them.

    Raises:
        WeightsError: the weights cannot be read or do not fit the model.
        ManifestError: the tokenizer cannot be loaded, or config.json describes a model that cannot be built here.
    """

    def __init__(self, weights: Path, manifest: Manifest) -> None:
        self.chat_template = build_chat_template(manifest)
        self.tokenizer = self.chat_template.tokenizer
        self.device = select_device()
        self.model = load_pretrained(weights, manifest.frames.size).to(self.device)
        self.encode: Encode = StreamEncoder(self.model.vision_tower, self.device)
        self._manifest = manifest
        self._files = MediaFileCache(manifest)

    def build_prompt(
        self, turns: Sequence[dict], files: Sequence[MediaFile], key: str = "", encode: Encode | None = None
    ) -> Batch:
        """Build the prompt of a dialogue: a batch of one row, on the model's device, with the tokens of its media.

        A few clips are in memory at a time, however long the videos are.

        Args:
            turns: ``{"from": "human", "value": ...}`` and so on. The last one is the question. Each of ``files`` has
                one ``<image>`` mark in the turns.
            files: the media, in the order of the marks.
            key: name of the dialogue; random sampling depends on it.
            encode: used in place of the attribute.

        Raises:
            MediaError: a file cannot be used; one line that names it.
            ValueError: marks and files do not fit, or the model takes fewer tokens.
        """
        row = self._prompts(files).build(turns, range(len(files)), key, encode=encode or self.encode)
        return row.to(self.device)

    def some_images(self, files: Sequence[MediaFile], most: int) -> list[np.ndarray]:
        """Return at most ``most`` of the images that the model sees, evenly spread: uint8 (S, S, 3) each.

        Raises:
            MediaError: a file cannot be used; one line that names it.
        """
        return self._prompts(files).some_images(range(len(files)), most)

    def _prompts(self, files: Sequence[MediaFile]) -> PromptBuilder:
        return PromptBuilder(self._manifest, self._files.media_views(files), self.chat_template)

    def media_views(self, files: Sequence[MediaFile]) -> list[MediaView]:
        """Return what the model is shown of each file: frames of a video, tiles of an image.

        Raises:
            MediaError: a file cannot be used; one line that names it.
        """
        return self._files.media_views(files).views(list(range(len(files))))

    def frame_times(self, files: Sequence[MediaFile], view: MediaView) -> list[float]:
        """Return the seconds in the source of the frames of a video's view."""
        timestamps = self._files.media_views(files).index.media["timestamps"][view.row].as_py()
        return [timestamps[frame] for frame in view.frame_indices]

    def answer(self, prompts: Sequence[Batch], max_new_tokens: int, sampling: Sampling = GREEDY) -> list[str]:
        """Generate the answers to ``prompts``, all at the same time.

        Args:
            prompts: as :meth:`build_prompt` makes them.
            max_new_tokens: longest answer.
            sampling: how tokens are chosen.
        """
        tokens = generate(self.model, prompts, max_new_tokens, self.chat_template.end_ids, sampling)
        return [self.decode(ids) for ids in tokens]

    def loglikelihoods(self, prompt: Batch, answers: Sequence[str]) -> list[LogLikelihood]:
        """Compute the log-likelihood of each of ``answers``, with the token that ends it."""
        state = prefill(self.model, [prompt])
        return loglikelihood(self.model, state, [self.chat_template.answer_ids(answer) for answer in answers])

    def decode(self, ids: Sequence[int]) -> str:
        """Decode the tokens of an answer, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)
