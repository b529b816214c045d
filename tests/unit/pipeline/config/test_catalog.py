"""Catalogs of entries: what a manifest makes of them, and that every fault is one line with file, field and fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from framestream.pipeline.config.schema import ManifestError
from framestream.pipeline.config.yaml_files import read_yaml

CATALOG = [
    {"folder": "hf:me/data:video/", "media_type": "video", "annotations": ["a.json", {"annotation": "b.json.gz"}]},
    {"root": "images", "annotations": [{"annotation": "c.jsonl", "root": "own", "samples": 3}, "d.json"]},
]
ENTRIES = [
    {"annotation": "hf:me/data:video/a.json", "media_type": "video"},
    {"annotation": "hf:me/data:video/b.json.gz", "media_type": "video"},
    {"annotation": "c.jsonl", "root": "own", "samples": 3},
    {"annotation": "d.json", "root": "images"},
]


def read(folder: Path, data: dict, catalog: object = CATALOG) -> list[dict]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "c.yaml").write_text(yaml.safe_dump(catalog), encoding="utf-8")
    (folder / "m.yaml").write_text(yaml.safe_dump({"stage": 3, "data": data}), encoding="utf-8")
    return read_yaml(folder / "m.yaml")["data"]["entries"]


def test_fields_of_a_group_hold_for_its_annotations(tmp_path):
    assert read(tmp_path, {"catalogs": ["data/c.yaml"]}) == ENTRIES


def test_sampling_is_by_name_or_the_default(tmp_path):
    data = {"catalogs": ["data/c.yaml"], "sampling": {"default": "first:10%", "first:5": ["b", "c"]}}
    sampling = [entry["sampling"] for entry in read(tmp_path, data)]
    assert sampling == ["first:10%", "first:5", "first:5", "first:10%"]


def test_own_entries_come_after_those_of_catalogs(tmp_path):
    own = {"annotation": "mine.json"}
    data = {"catalogs": ["data/c.yaml"], "sampling": {"default": "first:1"}, "entries": [own]}
    assert read(tmp_path, data)[-1] == own and len(read(tmp_path, data)) == 5


def test_a_catalog_is_beside_the_manifest_that_names_it(tmp_path):
    read(tmp_path, {"catalogs": ["data/c.yaml"]})
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "child.yaml").write_text("extends: ../m.yaml\noutput: there\n", encoding="utf-8")
    assert read_yaml(tmp_path / "below" / "child.yaml")["data"]["entries"] == ENTRIES


@pytest.mark.parametrize(
    ("data", "catalog", "message"),
    [
        ({"catalogs": "data/c.yaml"}, CATALOG, r"m\.yaml:\d: data\.catalogs: expected a list of file names"),
        ({"sampling": {"default": "all"}}, CATALOG, r"m\.yaml:\d: data\.catalogs: expected a list of file names"),
        ({"catalogs": ["data/x.yaml"]}, CATALOG, r"m\.yaml:\d: data\.catalogs: .*data/x\.yaml: no such file"),
        ({"catalogs": ["data/c.yaml"]}, {"a": 1}, r"c\.yaml: expected a list of groups"),
        ({"catalogs": ["data/c.yaml"]}, [{"folder": "x"}], r"c\.yaml:1: \[0\]\.annotations: expected a list"),
        ({"catalogs": ["data/c.yaml"]}, [{"folder": 3, "annotations": ["a"]}], r"\[0\]\.folder: expected text"),
        ({"catalogs": ["data/c.yaml"]}, [{"annotations": [7]}], r"\[0\]\.annotations\[0\]: expected a file name"),
        ({"catalogs": ["data/c.yaml"]}, [{"annotations": ["a"], "rot": "b"}], r"\[0\]\.rot: unknown field.*`root`"),
        ({"catalogs": ["data/c.yaml"], "entries": 4}, CATALOG, r"data\.entries: expected a list"),
        ({"catalogs": ["data/c.yaml"], "sampling": ["a"]}, CATALOG, r"data\.sampling: expected a mapping"),
        ({"catalogs": ["data/c.yaml"], "sampling": {"first:1": "a"}}, CATALOG, r"data\.sampling\.first:1: expected a"),
        ({"catalogs": ["data/c.yaml"], "sampling": {"first:1": ["aa"]}}, CATALOG, "is named 'aa'; did you mean `a`"),
        ({"catalogs": ["data/c.yaml"], "sampling": {"first:1": ["a", "a"]}}, CATALOG, "a is named twice"),
    ],
)
def test_faults_name_file_field_and_fix(tmp_path, data, catalog, message):
    with pytest.raises(ManifestError, match=message) as error:
        read(tmp_path, data, catalog)
    assert "\n" not in str(error.value)
