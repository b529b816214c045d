"""Benchmarks run; what benchmarks/model.py compares is the same arithmetic, and it notices where results differ."""

from __future__ import annotations

import pytest
import torch

from benchmarks import index, model, remote
from pipeline.manifest import VisionTower
from trainer.model.tome import ToMeConnector


@pytest.mark.parametrize("ways", [model.merging, model.connecting, model.learning], ids=lambda ways: ways.__name__)
def test_connectors_agree(ways):
    torch.manual_seed(0)
    model.compare(ways(ToMeConnector(48, 24, heads=4), torch.randn(3, 196, 48)))


@pytest.mark.parametrize(("clips", "stills"), [(2, 1), (1, 0)])
def test_towers_agree(clips, stills):
    torch.manual_seed(0)
    cfg = VisionTower(width=48, depth=3, heads=4, patch=16, table_side=8)
    pixels = torch.randn(clips, 3, 4, 128, 128), torch.randn(stills, 3, 1, 128, 128)
    with torch.no_grad():
        model.compare(model.encoding(cfg, 128, *pixels))


def test_results_that_differ_are_refused():
    ways = {"framestream": lambda: torch.zeros(4, 2), "other": lambda: torch.eye(4)[:, :2]}
    model.compare(ways, flips=0.5)
    with pytest.raises(SystemExit, match="other and framestream differ in 2 of 4"):
        model.compare(ways, flips=0.4)


def test_rows_name_every_implementation(capsys):
    model.measure("part", {"framestream": lambda: torch.zeros(1), "other": lambda: torch.zeros(1)}, repeats=2)
    first, second = capsys.readouterr().out.splitlines()
    assert "framestream" in first and "other" in second


def test_remote_reads_are_measured_over_every_client(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["remote", "--requests", "80"])
    remote.main()
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text for name in ("http.client", "urllib3", "httpx2", "1", "32"))
    assert "kB of a request of 1 MiB" in text


def test_memory_grows_neither_with_what_was_read_nor_much_with_the_index(tmp_path):
    """Four lengths, two orders and what sorting needs: 48 bytes a dialogue are far below any Python object for each."""
    made = {}
    for dialogues in (20_000, 220_000):
        folder = tmp_path / str(dialogues)
        folder.mkdir()
        index.generate(folder, dialogues, media=500)
        made[dialogues] = index.in_process(folder, 2000)
    small, large = made.values()
    held = [one.reading[-1].anonymous - one.idle.anonymous for one in (small, large)]
    assert held[1] - held[0] < 48 * 200_000
    for one in (small, large):
        assert one.reading[-1].anonymous - one.reading[2].anonymous < 2 * index.MIB
        assert one.reading[-1].peak - one.idle.now < 200 * index.MIB
