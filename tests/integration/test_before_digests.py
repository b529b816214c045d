"""Files written before digests: a shard root, its token cache and runs (tests/data/before_digests) are still read."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from framestream.pipeline import build_loader, load_manifest
from framestream.pipeline.config.schema import ManifestError
from framestream.tools import verify_shards
from framestream.trainer.checkpoint.save import checkpoint_settings
from framestream.trainer.inference.predictor import Predictor, resolve_run
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.paths import ROOT

FOLDER = ROOT / "tests" / "data" / "before_digests"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the folder; the paths in its manifests begin at the top of the repository."""
    monkeypatch.chdir(ROOT)
    return shutil.copytree(FOLDER, tmp_path / "before_digests")


def test_root_gives_the_stored_rows_and_keeps_its_cache(copy: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in (copy / "root" / "stage2" / "index").iterdir()}
    assert sum(path.name.startswith("tokens-") for path in files) == 1
    _replace_former_fields(copy / "manifest.yaml")
    rows = list(build_loader(load_manifest(copy / "manifest.yaml", [f"shards={copy / 'root'}"])))
    expected = np.load(copy / "rows.npz")
    assert len(rows) == len({name.split(".")[0] for name in expected.files}) > 0
    for name in expected.files:
        number, field = name.split(".")
        np.testing.assert_array_equal(np.asarray(getattr(rows[int(number)], field)), expected[name], name)
    assert not any(row.skipped for row in rows)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert set((copy / "root" / "stage2" / "index").iterdir()) == set(files)


def test_a_former_field_is_refused_and_read_where_it_is_stored(copy: Path) -> None:
    with pytest.raises(
        ManifestError, match=r"manifest.yaml:28: model.*\.group_clips: replaced by group_tokens \(.*784"
    ):
        load_manifest(copy / "manifest.yaml")
    assert load_manifest(copy / "stopped" / "manifest.yaml", stored=True).model.vision_tower.group_tokens == 25_088


def _replace_former_fields(manifest: Path) -> None:
    """Do what the error says."""
    manifest.write_text(manifest.read_text().replace("group_clips: 4", "group_tokens: 1024"))


def test_root_without_digests_is_verified(copy: Path, capsys: pytest.CaptureFixture) -> None:
    assert verify_shards.main([str(copy / "root" / "stage2"), "--deep"]) == 0
    assert "17 frames decoded" in capsys.readouterr().out


def test_weights_and_settings_of_a_finished_run_load(copy: Path) -> None:
    weights, manifest = resolve_run(copy / "finished")
    assert "text.tokenizer" in checkpoint_settings(manifest)
    assert sum(parameter.numel() for parameter in Predictor(weights, manifest).model.parameters()) > 40_000


@pytest.mark.slow
def test_stopped_run_resumes_and_ends_as_the_finished_one(copy: Path) -> None:
    sets = ["--set", f"output={copy / 'stopped'}", "--set", f"shards={copy / 'root'}"]
    _replace_former_fields(copy / "manifest.yaml")
    done = corpus.run_here("-m", "trainer", "--manifest", str(copy / "manifest.yaml"), *sets)
    assert "resumed from the checkpoint of step 1" in done.stderr
    expected, found = corpus.log(copy / "finished"), corpus.log(copy / "stopped")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=1e-4)
