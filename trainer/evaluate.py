"""``python -m trainer.evaluate --manifest M``: score held-out dialogues by greedy generation.

Every question is asked twice: with its own frames, and *blind*: with the frames of another dialogue of the same
family whose answer differs. A model that answers from the wording alone scores the same both times. Intervals are
95 % bootstrap percentiles over questions; the gain's interval resamples both answers of a question together.
Results go to RUN/evaluation.json.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from pipeline.index import ShardsError
from pipeline.manifest import Manifest, ManifestError, load_manifest
from pipeline.questions import Questions
from pipeline.shard_format import encode_jpeg
from trainer.checkpoint import write_atomically
from trainer.generate import generate
from trainer.weight_files import WeightsError
from trainer.weights import load_pretrained

RESAMPLES = 2000  #: bootstrap resamples
EXAMPLES = 3  #: questions of each family shown with their frames


def normalise(text: str) -> str:
    """Case, surrounding space and a final full stop do not count."""
    return text.strip().lower().rstrip(".")


def blind_partners(families: list[str], answers: list[str], shown: list[int], seed: int) -> list[int | None]:
    """For each question another one of its family with a different answer, or None where there is none.

    Partners are drawn uniformly among those that show at least as many media; a question without media has none.
    """
    rng = np.random.default_rng(seed)
    by_family: dict[str, list[int]] = {}
    for i, family in enumerate(families):
        by_family.setdefault(family, []).append(i)
    partners: list[int | None] = []
    for family, answer, count in zip(families, answers, shown, strict=True):
        family_others = by_family[family] if count else []
        others = [j for j in family_others if normalise(answers[j]) != normalise(answer) and shown[j] >= count]
        partners.append(others[rng.integers(len(others))] if others else None)
    return partners


def interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """95 % bootstrap percentile interval of the mean of ``values`` (n,)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarise(family: str, right: np.ndarray, blind: np.ndarray, seed: int) -> dict:
    """Accuracy, blind accuracy and gain of one family, in points of 100, with intervals.

    Args:
        right: (n,) whether each question was answered rightly with its own frames.
        blind: (n,) the same with another question's frames.
    """
    row: dict = {"family": family, "questions": len(right)}
    gain = right.astype(float) - blind.astype(float)
    for name, values in (("", right.astype(float)), ("blind_", blind.astype(float)), ("gain_", gain)):
        low, high = interval(values, seed)
        row[{"": "accuracy", "blind_": "blind", "gain_": "gain"}[name]] = 100 * float(values.mean())
        row[name + "low"], row[name + "high"] = 100 * low, 100 * high
    return row


def evaluate(manifest: Manifest, checkpoint: Path, limit: int | None = None) -> dict:
    """Answer every held-out question with its own frames and blind; returns what evaluation.json holds."""
    questions = Questions(manifest, split="val")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_pretrained(checkpoint).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(manifest.text.tokenizer)
    chosen = _choose(questions, limit)
    families = [questions.family(i) for i in chosen]
    answers = [questions.answer(i) for i in chosen]
    partners = blind_partners(families, answers, [questions.shown(i) for i in chosen], manifest.seed)
    asked = [n for n, partner in enumerate(partners) if partner is not None]
    work = [(chosen[n], chosen[n]) for n in asked] + [(chosen[n], chosen[partners[n]]) for n in asked]
    size = manifest.evaluate.batch
    order = sorted(range(len(work)), key=lambda w: questions.length(work[w][0], work[w][1]))
    texts: dict[int, str] = {}
    with tqdm(total=len(work), desc="questions", unit="question", dynamic_ncols=True) as bar:
        for at in range(0, len(order), size):
            group = order[at : at + size]
            prompts = [questions.prompt(work[w][0], media_of=work[w][1]).to(device) for w in group]
            outputs = generate(model, prompts, manifest.evaluate.max_new_tokens, tokenizer.eos_token_id)
            for w, tokens in zip(group, outputs, strict=True):
                texts[w] = tokenizer.decode(tokens, skip_special_tokens=True).strip()
            bar.update(len(group))
    given = [texts[w] for w in range(len(work))]
    own, blind = given[: len(asked)], given[len(asked) :]
    return {
        "checkpoint": str(checkpoint),
        "families": _families(asked, families, answers, own, blind, manifest.seed),
        "without_partner": len(chosen) - len(asked),
        "examples": _examples(questions, chosen, asked, families, answers, own, blind),
    }


def _choose(questions: Questions, limit: int | None) -> list[int]:
    """All held-out questions, or the first ``limit`` of each family."""
    if limit is None:
        return list(range(len(questions)))
    counts: dict[str, int] = {}
    chosen = []
    for i in range(len(questions)):
        family = questions.family(i)
        counts[family] = counts.get(family, 0) + 1
        if counts[family] <= limit:
            chosen.append(i)
    return chosen


def _families(asked, families, answers, own, blind, seed) -> list[dict]:
    rows = []
    for family in sorted({families[n] for n in asked}):
        places = [p for p, n in enumerate(asked) if families[n] == family]
        expected = [normalise(answers[asked[p]]) for p in places]
        right = np.array([normalise(own[p]) == e for p, e in zip(places, expected, strict=True)])
        wrong = np.array([normalise(blind[p]) == e for p, e in zip(places, expected, strict=True)])
        rows.append(summarise(family, right, wrong, seed))
    return rows


def _examples(questions, chosen, asked, families, answers, own, blind) -> list[dict]:
    shown: dict[str, int] = {}
    examples = []
    for p, n in enumerate(asked):
        family = families[n]
        shown[family] = shown.get(family, 0) + 1
        if shown[family] > EXAMPLES:
            continue
        row = questions.prompt(chosen[n])
        frames = [*row.clips.flatten(0, 1).numpy(), *row.stills.numpy()]
        picked = [frames[i] for i in np.linspace(0, len(frames) - 1, min(len(frames), 16)).round().astype(int)]
        examples.append(
            {
                "family": family,
                "question": questions.question(chosen[n]),
                "expected": answers[n],
                "given": own[p],
                "blind_given": blind[p],
                "frames_jpeg": [base64.b64encode(encode_jpeg(f, 85, "420")).decode("ascii") for f in picked],
            }
        )
    return examples


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status (0 done, 1 weights that cannot be read, 2 bad input)."""
    parser = argparse.ArgumentParser(prog="python -m trainer.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--manifest", required=True, help="the stage's YAML; its held-out entries are asked")
    parser.add_argument("--checkpoint", type=Path, help="folder of final weights; the manifest's run if not given")
    parser.add_argument("--limit", type=int, help="ask only the first LIMIT questions of each family")
    parser.add_argument("--out", type=Path, help="file of the results; RUN/evaluation.json if not given")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    options = parser.parse_args(arguments)
    try:
        manifest = load_manifest(options.manifest, options.set)
        checkpoint = options.checkpoint or Path(manifest.output) / "final"
        if not checkpoint.is_dir():
            raise WeightsError(f"{checkpoint}: not trained yet; run python -m trainer --manifest {options.manifest}")
        result = evaluate(manifest, checkpoint, options.limit)
    except (ManifestError, ShardsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = options.out or Path(manifest.output) / "evaluation.json"
    result["command"] = f"python -m trainer.evaluate --manifest {options.manifest}"
    write_atomically(out, json.dumps(result, indent=1))
    print(f"{'family':<16}{'questions':>10}{'accuracy':>10}{'blind':>8}{'gain':>8}  95 % interval of the gain")
    for row in result["families"]:
        print(
            f"{row['family']:<16}{row['questions']:>10}{row['accuracy']:>10.1f}{row['blind']:>8.1f}"
            f"{row['gain']:>8.1f}  {row['gain_low']:.1f} to {row['gain_high']:.1f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
