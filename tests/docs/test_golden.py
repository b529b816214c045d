"""The committed golden set is whole, every file of it is read by a golden test, and absent files make no test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.golden_data import COMMITTED
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

UNIT = "tests/unit/pipeline"
SAMPLING, IMAGES = f"{UNIT}/media/test_sampling.py", f"{UNIT}/media/test_tiling.py"
GROUPING = f"{UNIT}/planning/test_length_grouping.py"
PUBLISHED = "tests/unit/pipeline/media/test_reference_sampling.py"
CONVERSATION, ROWS = (
    "tests/unit/pipeline/tokenization/test_chat_template.py",
    "tests/unit/pipeline/loading/test_collate.py",
)
TOME, UMT, INTERNVIDEO2 = (f"tests/unit/trainer/model/test_{name}.py" for name in ("tome", "umt", "internvideo2"))
SEQUENCE, EXPORT = "tests/unit/trainer/model/test_golden_sequence.py", "tests/integration/trainer/test_export.py"

#: Every kind of golden file, and the tests that compare its rows, cases and arrays.
READ_BY = {
    "frame_indices/table.jsonl": (SAMPLING, "frame_indices"),
    **{f"frame_indices/{name}.jsonl": (PUBLISHED, name) for name in ("decord", "folder", "gif", "lazy")},
    "anyres/grids.json": (IMAGES, "grids", "grids_among_others", "unsupported_tiles"),
    "anyres/pictures.json": (IMAGES, "tiles", "frames"),
    "anyres/sources.npz": (IMAGES, "tiles", "frames"),
    "anyres/pixels_after_resize.npz": (IMAGES, "pixels"),
    "tokens_labels/cases.jsonl": (
        CONVERSATION,
        *("ids_and_labels", "second_fetch", "refused"),
        *("first_turns_fail_when_published", "first_turns_accepted_as_what_they_say"),
    ),
    "tokens_labels/facts.json": (CONVERSATION, "tokenizer_facts"),
    "tokens_labels/tokenizer/tokenizer*.json": (CONVERSATION, "tokenizer_facts"),
    "tokens_labels/collate.json": (ROWS, "collate", "collate_packed"),
    "length_grouping/cases.json": (GROUPING, "length_grouping", "length_grouping_refused", "even_chunks"),
    "tome_connector/cases.json": (TOME, "tome_connector", "tome_connector_refused"),
    "tome_connector/outputs.npz": (TOME, "tome_connector"),
    "tome_connector/weights.safetensors": (TOME, "tome_connector"),
    "umt_vit/cases.json": (UMT, "umt_outputs"),
    "umt_vit/*.npz": (UMT, "umt_outputs", "umt_positions"),
    "umt_vit/*.safetensors": (UMT, "umt_outputs"),
    "internvideo2_vit/cases.json": (INTERNVIDEO2, "internvideo2_outputs"),
    "internvideo2_vit/*.npz": (INTERNVIDEO2, "internvideo2_outputs", "internvideo2_start_positions"),
    "internvideo2_vit/position_resize.npz": (INTERNVIDEO2, "internvideo2_position_resize"),
    "internvideo2_vit/*.safetensors": (INTERNVIDEO2, "internvideo2_outputs"),
    "multimodal_sequence/cases.json": (SEQUENCE, "multimodal_sequence_packed", "multimodal_sequence_rows_alone"),
    "multimodal_sequence/outputs.npz": (SEQUENCE, "multimodal_sequence_packed"),
    "multimodal_sequence/weights.safetensors": (SEQUENCE, "multimodal_sequence_packed"),
    "multimodal_sequence/config.json": (EXPORT, "settings_are_in_config"),
    "multimodal_sequence/odd_inputs.json": (
        ROWS,
        *(f"odd_inputs_{name}" for name in ("no_whole_clips", "no_row_is_dropped", "no_media_item_is_repeated")),
    ),
}
#: Files that others name: NAME.npz and NAME.safetensors stand in cases.json.
NAMED_ELSEWHERE = ("internvideo2_vit/position_resize.npz",)


def collected(folder: Path) -> dict[str, int]:
    """Number of cases of every golden test, as ``tests/FILE.py::NAME``, with the golden set of ``folder``."""
    modules = sorted({module for module, *_ in READ_BY.values()})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", "test_golden_"]
    done = subprocess.run(
        [*command, *modules],
        cwd=ROOT,
        env={**os.environ, "GOLDEN_DIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode in (0, pytest.ExitCode.NO_TESTS_COLLECTED), done.stdout + done.stderr
    names = re.findall(r"^(tests/\S+?::test_golden_\w+)", done.stdout, re.M)
    return {name: names.count(name) for name in names}


def test_every_kind_is_in_the_committed_set_and_nothing_else():
    matched = {pattern: set(COMMITTED.glob(pattern)) for pattern in READ_BY}
    assert not [pattern for pattern, found in matched.items() if not found]
    there = {path for path in COMMITTED.rglob("*") if path.is_file() and path.name != "README.md"}
    assert there == set.union(*matched.values())


@pytest.mark.parametrize("pattern", READ_BY)
def test_the_module_that_reads_a_file_names_it(pattern):
    module, *_ = READ_BY[pattern]
    source = (ROOT / module).read_text(encoding="utf-8")
    for name in re.findall(r"^from (tests\.helpers\.model\.\w+) import", source, re.M):
        source += (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    parts = pattern.split("/")
    if pattern in NAMED_ELSEWHERE:
        assert parts.pop() in (COMMITTED / parts[0] / "cases.json").read_text(encoding="utf-8")
    assert not [part for part in parts if "*" not in part and Path(part).stem not in source]


def test_every_golden_test_has_cases_in_the_committed_set():
    counts = collected(COMMITTED)
    wanted = {f"{module}::test_golden_{name}" for module, *names in READ_BY.values() for name in names}
    assert not wanted - counts.keys()


def test_absent_files_make_no_test(tmp_path):
    assert collected(tmp_path) == {}
