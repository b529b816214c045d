"""Targets of files without digests: a root and a run of a version before there were any.

Damage there may go unnoticed, so another result is accepted. Everything else is judged as usual.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from benchmarks.fuzz.corpus import MANIFEST, ROOT, RUN, SHARDS
from benchmarks.fuzz.run_targets import STEP, export_checkpoint, repeat_run, resume_run
from benchmarks.fuzz.shard_targets import read_epoch, read_reports, verify_root
from benchmarks.fuzz.target import Target
from tests.helpers.paths import ROOT as REPOSITORY

OLD = REPOSITORY / "tests" / "data" / "before_digests"
TOKENIZER_PATH = "tests/golden/tokens_labels/tokenizer"  #: in the settings of the run


def copy_old_root(corpus: Path) -> None:
    """Copy the root with its token cache, its tokenizer and its manifest."""
    shutil.copytree(OLD / "root", SHARDS)
    shutil.copytree(REPOSITORY / TOKENIZER_PATH, TOKENIZER_PATH)
    text = (OLD / "manifest.yaml").read_text(encoding="utf-8")
    old = OLD.relative_to(REPOSITORY)
    text = text.replace(f"{old}/finished", RUN).replace(f"{old}/root", SHARDS)
    text = text.replace("group_clips: 4", "group_tokens: 1024")  # as the error of the earlier field says
    Path(MANIFEST).write_text(text, encoding="utf-8")


def copy_stopped_run(corpus: Path) -> None:
    """Copy the root and the run that was stopped after one step."""
    copy_old_root(corpus)
    shutil.copytree(OLD / "stopped", RUN)


def copy_finished_run(corpus: Path) -> None:
    """Copy the root and the finished run."""
    copy_old_root(corpus)
    shutil.copytree(OLD / "finished", RUN)


_INDEX = (f"{ROOT}/index/*.arrow", f"{ROOT}/build.json")

OLD_TARGETS = (
    Target("old-index", copy_old_root, _INDEX, read_epoch, is_truth=True),
    Target("old-reports", copy_old_root, (*_INDEX, f"{ROOT}/ledger/*"), read_reports, is_truth=True),
    Target("old-verified", copy_old_root, (f"{ROOT}/**/*",), verify_root, is_truth=True),
    Target("old-checkpoints", copy_stopped_run, (f"{RUN}/checkpoints/**/*",), resume_run, is_truth=True, share=0.3),
    Target("old-export", copy_stopped_run, (f"{RUN}/checkpoints/{STEP}/*",), export_checkpoint, is_truth=True),
    Target("old-settings", copy_finished_run, (f"{RUN}/settings.json",), repeat_run, is_truth=True, share=0.3),
)
