"""The connector against the published numbers and against merging one token at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from framestream.trainer.model import tome
from framestream.trainer.model.tome import ToMeConnector, assign_tokens, merge, merge_units, pool
from tests.helpers.golden_data import GOLDEN, json_file, present
from tests.helpers.model.golden_model import ATOL, RTOL, normals, weights

FILES = GOLDEN / "tome_connector"
TABLE = json_file("tome_connector/cases.json") or {}
CASES = TABLE["cases"] if TABLE and present("tome_connector/weights.safetensors", "tome_connector/outputs.npz") else []


@pytest.mark.parametrize("case", [pytest.param(c, id=c["case"]) for c in CASES])
def test_golden_tome_connector(case, monkeypatch):
    connector = ToMeConnector(TABLE["mm_hidden_size"], TABLE["hidden_size"])
    connector.load_state_dict(weights(FILES / "weights.safetensors"))
    rows = normals(case["input_seed"], case["input_shape"], case["input_sha256"])
    empty, call = rows[:0], case["call"]
    rounds, match = [], tome.bipartite_soft_matching

    def counted(keys: torch.Tensor, removed: int) -> torch.Tensor:
        if len(keys):
            rounds.append([keys.shape[1], removed])
        return match(keys, removed)

    monkeypatch.setattr(tome, "bipartite_soft_matching", counted)
    with torch.no_grad():
        if not call.get("compress"):
            out = connector(merge_units(empty, rows, TABLE["num_heads"]))
        else:
            frames = call.get("local_num_frames", len(rows))
            clips = rows.reshape(len(rows) // frames, -1, rows.shape[-1])
            # all frames as one clip merge to 16 tokens a frame; the connector's own clips have 4 frames
            whole = frames != 4
            heads = TABLE["num_heads"]
            merged = merge(clips, 16 * frames, heads) if whole else merge_units(clips, empty, heads)
            out = connector(merged)
    assert rounds == case["merge_rounds_tokens_and_removed"]
    expected = np.load(FILES / "outputs.npz")[case["output_key"]]
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=ATOL, rtol=RTOL)


@pytest.mark.parametrize("error", [pytest.param(e, id=e["what"]) for e in TABLE.get("errors", [])])
def test_golden_tome_connector_refused(error):
    """There, a video that is not compressed and a wrong number of patches fail; here a clip is always compressed."""
    connector = ToMeConnector(TABLE["mm_hidden_size"], TABLE["hidden_size"])
    clips, stills = torch.randn(1, 256, TABLE["mm_hidden_size"]), torch.zeros(0, 64, TABLE["mm_hidden_size"])
    if "compress" in error["what"]:
        assert connector(merge_units(clips, stills, TABLE["num_heads"])).shape == (64, TABLE["hidden_size"])
    else:
        with pytest.raises(ValueError, match="63 patches cannot be merged to 64 tokens"):
            merge_units(clips[:, :63], stills, TABLE["num_heads"])


def one_by_one(patches: np.ndarray, wanted: int, heads: int) -> np.ndarray:
    """The rule of golden/README.md on one clip (P, C), with lists and loops in float64."""
    tokens = [(patch.astype(np.float64), 1) for patch in patches]
    while len(tokens) > wanted:
        removed = min(len(tokens) // 2, len(tokens) - wanted)
        keys = [value.reshape(heads, -1).mean(0) for value, _ in tokens]
        keys = [key / np.linalg.norm(key) for key in keys]
        even, odd = list(range(0, len(tokens), 2)), list(range(1, len(tokens), 2))
        best = {e: max(odd, key=lambda o, e=e: keys[e] @ keys[o]) for e in even}
        order = sorted(even, key=lambda e: -(keys[e] @ keys[best[e]]))
        groups = {o: [tokens[o]] for o in odd}
        for e in order[:removed]:
            groups[best[e]].append(tokens[e])
        joined = [(sum(v * n for v, n in group), sum(n for _, n in group)) for group in groups.values()]
        tokens = [tokens[e] for e in order[removed:]] + [(total / size, size) for total, size in joined]
    return np.stack([value for value, _ in tokens])


@given(patches=st.integers(64, 150), clips=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_merging_equals_merging_one_by_one(patches, clips, seed):
    values = np.random.default_rng(seed).standard_normal((clips, patches, 24)).astype(np.float32)
    merged = merge(torch.from_numpy(values), 64, heads=4)
    for n in range(clips):
        np.testing.assert_allclose(merged[n], one_by_one(values[n], 64, 4), atol=1e-4, rtol=1e-4)


@given(patches=st.integers(65, 400), seed=st.integers(0, 2**32 - 1))
def test_every_patch_lands_in_a_token_and_no_token_is_empty(patches, seed):
    values = torch.randn(2, patches, 16, generator=torch.Generator().manual_seed(seed))
    token = assign_tokens(values, 64, heads=4)
    for n in range(2):
        assert torch.bincount(token[n], minlength=64).min() >= 1 and token[n].max() == 63


def test_as_many_patches_as_tokens_stay_as_they_are():
    patches = torch.randn(2, 64, 16)
    assert torch.equal(merge(patches, 64, heads=4), patches)


def test_too_few_patches_are_refused():
    with pytest.raises(ValueError, match="49 patches cannot be merged to 64"):
        merge(torch.randn(1, 49, 16), 64, heads=4)


def test_gradient_of_a_patch_is_its_share_of_the_token():
    patches = torch.randn(1, 130, 16, requires_grad=True)
    token = assign_tokens(patches, 64, heads=4)
    merge(patches, 64, heads=4).sum().backward()
    share = 1.0 / torch.bincount(token[0], minlength=64)[token[0]]
    torch.testing.assert_close(patches.grad[0], share.unsqueeze(1).expand(-1, 16))


def test_connector_never_waits_for_the_device():
    """Tensors on ``meta`` have no values: whatever copies one to the host (item, nonzero, a mask as index) raises."""
    connector = ToMeConnector(16, 8).to("meta")
    clips, stills = torch.empty(3, 784, 16, device="meta"), torch.empty(2, 196, 16, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        clips[clips > 0]
    out = connector(merge_units(clips.requires_grad_(), stills.requires_grad_(), 4))
    out.sum().backward()
    assert out.shape == (320, 8) and clips.grad.shape == clips.shape and stills.grad.shape == stills.shape


def test_results_depend_neither_on_the_other_clips_nor_on_the_run():
    clips = torch.randn(5, 300, 16, generator=torch.Generator().manual_seed(0))
    together = merge(clips, 64, heads=4)
    assert torch.equal(together, merge(clips, 64, heads=4))
    for n in range(5):
        torch.testing.assert_close(together[n : n + 1], merge(clips[n : n + 1], 64, heads=4))


@given(rows=st.integers(1, 40), groups=st.integers(1, 12), clips=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_pooling_equals_adding_one_row_at_a_time(rows, groups, clips, seed):
    rng = np.random.default_rng(seed)
    values, group = rng.standard_normal((clips, rows, 6)), rng.integers(0, groups, (clips, rows))
    expected, counts = np.zeros((clips, groups, 6)), np.zeros((clips, groups, 1))
    for n, r in np.ndindex(clips, rows):
        expected[n, group[n, r]] += values[n, r]
        counts[n, group[n, r]] += 1
    values, group = torch.from_numpy(values), torch.from_numpy(group)
    np.testing.assert_allclose(pool(values, group, groups, "sum"), expected, atol=1e-12)
    np.testing.assert_allclose(pool(values, group, groups, "mean"), expected / counts.clip(1), atol=1e-12)
