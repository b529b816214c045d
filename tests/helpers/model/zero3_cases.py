"""Training runs with equal results under ZeRO-3 and in one process: manifests and the rows of each rank."""

from __future__ import annotations

import dataclasses

from framestream.pipeline.config.manifest import Manifest
from framestream.pipeline.config.model import InitFromConfig
from framestream.pipeline.config.training import LoraConfig, PartConfig
from framestream.pipeline.loading.batch import Batch
from framestream.trainer.training.drop_path_rng import drop_path_random
from tests.helpers.model.manifests import FROZEN, manifest
from tests.helpers.model.rows import INTERNVIDEO2, SIZE, SMALL, dialogue, pack

EPSILON = 1e-4  #: of AdamW: large enough that a gradient which is but rounding makes no step


STARTS = {  #: folder of the start weights -> architecture
    "start": SMALL,
    "tied": dataclasses.replace(
        SMALL, language_model=dataclasses.replace(SMALL.language_model, tie_word_embeddings=True)
    ),
    "internvideo2": dataclasses.replace(
        INTERNVIDEO2, vision_tower=dataclasses.replace(INTERNVIDEO2.vision_tower, drop_path=0.3)
    ),
}


#: the tensors of ``start`` in files of other layouts; relative, because rank 1 works in a folder that has none of them
FILES = {
    "released": InitFromConfig(run="released"),
    "own_files": InitFromConfig(vision_tower="encoder.pt", connector="mm_projector.bin", language_model="qwen"),
}


def settings(init: InitFromConfig, start: str = "start", recompute: str = "all", **train) -> Manifest:
    base = manifest(SIZE, STARTS[start], **train)
    options = {"dtype": "fp32", "clip_norm": 0.0, "epsilon": EPSILON, "gradient_checkpointing": recompute}
    return dataclasses.replace(base, train=dataclasses.replace(base.train, **options), init_from=init)


RATE = 1e-2
ADAPTED = PartConfig(train=True, lr=RATE, lora=LoraConfig(r=4, alpha=8.0))


def _with_drop_path(row: Batch) -> Batch:
    """Return the row with the random numbers of a training step: two for each block but the last."""
    return dataclasses.replace(row, drop_path_rand=drop_path_random(row, 0, 2 * (INTERNVIDEO2.vision_tower.depth - 1)))


def cases() -> dict[str, tuple[Manifest, list[tuple]]]:
    """Return name -> manifest and, for every step, the row of each rank."""
    text, video = dialogue(0, text=20), dialogue(1, clips=2, text=11)
    stills, both, long = dialogue(2, stills=3), dialogue(3, clips=1, stills=1, text=9), dialogue(4, clips=9, text=60)
    steps = [
        (pack([text]), pack([video])),
        (pack([long, text]), pack([video])),  # five groups beside one
        (pack([]), pack([both, text, stills])),
        (pack([stills]), pack([])),
    ]
    start, frozen = InitFromConfig(run="start"), {"language_model": FROZEN}
    return {
        "all_trained": (settings(start, recompute="none"), steps),
        "stage_1": (settings(start, vision_tower=FROZEN, **frozen), steps),
        "stage_4": (settings(start, recompute="tower", **frozen), steps),
        "tied_head": (settings(InitFromConfig(run="tied"), "tied", "layers:1"), steps),
        "internvideo2_trained": (
            settings(InitFromConfig(run="internvideo2"), "internvideo2"),
            [tuple(map(_with_drop_path, rows)) for rows in steps],
        ),
        "adapters": (settings(start, vision_tower=ADAPTED, language_model=ADAPTED), steps),
        **{name: (settings(init), steps[2:3]) for name, init in FILES.items()},
    }
