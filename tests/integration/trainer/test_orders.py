"""Any mix of text, images and videos on any rank: no rank waits forever, and the result is that of one process.

Two ranks run the four kinds of rows in all 24 orders in two micro-steps. Four ranks run them in one, each kind on each
rank once. They compare their model calls after each. Loss and every part's gradient must equal those of one process
without DeepSpeed: in float32, the norm of the difference is at most 1e-5 of the norm. The frames are noise. They are
chosen so that no choice of token merging depends on less than 1e-4 of cosine similarity, because a choice that rounding
flips would change the output completely. The ranks compute on the stand-in device where there is a compiler.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from framestream.pipeline.config.model import TOKENS_PER_CLIP
from framestream.trainer.model.parts import PARTS
from framestream.trainer.weights.load import save_weights
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.model.margins import margin
from tests.helpers.model.orders import KINDS, SETTINGS, SIDE, one_process, row, settings
from tests.helpers.model.rows import SMALL, small_model

MARGIN = 1e-4  #: of cosine similarities; float32 knows them to about 1e-6
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """First weights in ``start/``."""
    folder = tmp_path_factory.mktemp("orders")
    save_weights(small_model(size=SIDE), folder / "start" / "final", settings())
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path):
    """Loss, gradients and model of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return one_process()


def test_no_merging_choice_is_close(alone) -> None:
    _, _, model = alone
    for kind in set(KINDS) - {"text"}:
        batch = row(kind)
        with torch.no_grad():
            tower = model.vision_tower
            units = tower.encode_patches(tower.normalize(batch.clips), tower.normalize(batch.image_tiles.unsqueeze(1)))
        for patches in (*units[0], *units[1]):
            assert len(patches) > TOKENS_PER_CLIP
            assert margin(patches.numpy(), TOKENS_PER_CLIP, SMALL.vision_tower.heads) > MARGIN


@pytest.mark.parametrize("world", [2, 4])
def test_every_order_of_rows_equals_one_process(folder: Path, alone, world: int) -> None:
    loss, gradients, _ = alone
    worker = ("-m", "tests.helpers.workers.orders_worker", str(folder))
    corpus.run(*corpus.on_device(["torchrun", "--standalone", "--nproc_per_node", str(world), *worker]))
    losses = json.loads((folder / f"{world}.json").read_text())
    assert len(losses["zero3"]) == {2: 24, 4: 4}[world] and losses.keys() == (
        SETTINGS.keys() if world == 2 else {"zero3"}
    )
    worst = 0.0
    for name, of_orders in losses.items():
        for order, found in of_orders.items():
            assert found == pytest.approx(loss, rel=TOLERANCE), (name, order)
            theirs = load_file(folder / f"{world}-{name}-{order}.safetensors")
            assert theirs.keys() == gradients.keys()
            for part in PARTS:
                mine = {key: value for key, value in gradients.items() if key.startswith(part)}
                away = sum((theirs[key].reshape(value.shape) - value).square().sum() for key, value in mine.items())
                norm = sum(value.square().sum() for value in mine.values())
                assert norm > 0
                worst = max(worst, (away / norm).sqrt().item())
    print(f"{world} ranks: largest difference of a part's gradient {worst:.1e} of its norm")
    assert worst <= TOLERANCE
