"""The short form of ``make rehearsal``, and what it checks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.rehearsal.commands import RehearsalError, Stage
from benchmarks.rehearsal.hub import count_selected, published_entries, read_roots
from framestream.pipeline.config.data import EntryConfig
from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.paths import ROOT


def test_published_stages_run_from_a_local_hub_to_scores(tmp_path):
    """Stages 1 and 4 with an entry for each reader and location, from annotation files to scores and an export."""
    command = [sys.executable, "-m", "benchmarks.rehearsal", "--short", "--folder", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=ROOT, env=corpus.environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "work" / "release" / "model.safetensors").is_file()
    assert all(name in done.stdout for name in ("stage 1: train", "stage 4: build", "export", "evaluate"))


def test_every_published_entry_has_a_place_of_its_own(tmp_path):
    """Media are nowhere but where the published root map says, and no folder of it stays outside the rehearsal's."""
    entries, roots = published_entries(), read_roots(tmp_path)
    assert len(entries) == 114 and sum(map(len, entries.values())) == 224
    for entry in (entry for found in entries.values() for entry in found if entry.media_type != "text"):
        assert roots.get(entry.name, roots.get(entry.root)), entry.name
    assert all(value.startswith((f"dir:{tmp_path}/data/", "hf:")) for value in roots.values() if isinstance(value, str))


@pytest.mark.parametrize(("sampling", "selected"), [("all", 9), ("first:25%", 3), ("first:10%", 1)])
def test_selected_samples_are_rounded_up(sampling, selected):
    assert count_selected(EntryConfig(annotation="a.json", sampling=sampling), 9) == selected


def test_commands_that_fail_or_print_a_traceback_end_it(tmp_path):
    stage = Stage(tmp_path, "", "", [])
    assert stage.run("good", sys.executable, "-c", "print(1)") == "1\n"
    for code in ("raise SystemExit(3)", "import sys; print('Traceback', file=sys.stderr)"):
        with pytest.raises(RehearsalError, match="bad"):
            stage.run("bad", sys.executable, "-c", code)
