"""Samples of JSON files, against Python's own parser: what is wrong with one costs that one alone."""

import gzip
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.annotations import json_samples
from framestream.pipeline.annotations.json_samples import MAX_DEPTH, parse_lines, parse_list, read_json_samples
from framestream.pipeline.annotations.normalize import AnnotationError
from framestream.pipeline.annotations.text_files import AnnotationFileError

LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
VALUES = st.recursive(
    LEAVES | st.sampled_from(['"', "\\", "[]{},", '\\"', "]\n,"]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
SAMPLES = st.lists(st.dictionaries(st.text(max_size=5), VALUES, max_size=3), max_size=5)
GOOD = [{"id": number, "conversations": []} for number in range(3)]


def pieces(text, cuts):
    ends = sorted({cut % (len(text) + 1) for cut in cuts} | {len(text)})
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


@given(SAMPLES, st.lists(st.integers(0, 10_000), max_size=9), st.booleans(), st.sampled_from([None, 1]))
def test_lists_in_any_pieces_are_those_of_json(samples, cuts, ascii_only, indent):
    text = json.dumps(samples, ensure_ascii=ascii_only, indent=indent)
    assert list(parse_list("a.json", iter(pieces(text, cuts)))) == json.loads(text)


@given(SAMPLES, st.lists(st.integers(0, 10_000), max_size=9))
def test_lines_in_any_pieces_are_those_of_json(samples, cuts):
    text = "".join(json.dumps(sample) + "\n" for sample in samples)
    assert list(parse_lines(iter(pieces(text, cuts)))) == samples


DEEP = '{"x": ' + "[" * 500 + "]" * 500 + "}"


@pytest.mark.parametrize("bad", ['{"id": }', '{"a": tru}', '{"a" 1}', '{"a": "\n"}', DEEP, '{"a": [1,, 2]}'])
@pytest.mark.parametrize("cut", [1, 7, 40, 10**6])
def test_a_bad_sample_costs_itself_alone(bad, cut):
    text = f"[{json.dumps(GOOD[0])}, {bad}, {json.dumps(GOOD[2])}]"
    found = list(parse_list("a.json", (text[start : start + cut] for start in range(0, len(text), cut))))
    assert found[0] == GOOD[0] and found[-1] == GOOD[2] and len(found) == 3
    assert isinstance(found[1], AnnotationError) and found[1].reason == "bad_sample"


def test_values_as_python_writes_them(tmp_path):
    written = [{"a": math.nan, "b": math.inf, "c": 2**63, "d": -(2**63), "e": 10**400}]
    (tmp_path / "a.json").write_text(json.dumps(written))
    (tmp_path / "a.jsonl").write_text(json.dumps(written[0]) + "\n")
    for name in ("a.json", "a.jsonl"):
        [sample] = read_json_samples(tmp_path / name)
        assert math.isnan(sample["a"]) and sample["b"] == math.inf
        assert [sample["c"], sample["d"], sample["e"]] == [str(2**63), -(2**63), str(10**400)]


def test_a_comma_too_many_is_named():
    first, empty = parse_list("a.json", ['[{"id": 1},]'])
    assert first == {"id": 1} and "after the last one" in str(empty)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.json", "A.JSONL"])
@pytest.mark.parametrize("lines", [False, True])
def test_encodings_and_forms_are_told_by_the_content(tmp_path, encoding, name, lines):
    samples = [{**sample, "text": "é 漢 😀"} for sample in GOOD]
    text = "\n".join(json.dumps(sample, ensure_ascii=False) for sample in samples)
    text = text if lines else json.dumps(samples, ensure_ascii=False, indent=1)
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert list(read_json_samples(tmp_path / name)) == samples


def test_gzip_by_another_name_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert list(read_json_samples(tmp_path / "a.json")) == GOOD


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML page"),
        (b'{"data": [{"id": 1}]}', "field `data`"),
        (b'{"data": [{"id": 1, "conversations": []}]}', "field `data`"),
        (b'{"info": {"year": 2024}, "annotations": [{"id": 1}]}', "field `annotations`"),
        (b'{"a1": {"id": 1, "conversations": [{}]}}', "values are the samples"),
        (b'{"conversations": [{}]}{"conversations": [{}]}', "jq -s ."),
        (b'{\n "id": 1,\n "conversations": [{}]\n}', "jq -s ."),
        (b"SQLite format 3\0", "SQLite database"),
        (b"<?xml version='1.0'?><Error/>", "error message of a server"),
        (b'{"a1": {"id": 1}}', "values are the samples"),
        (b"PK\3\4rest", "zip archive"),
        (gzip.compress(gzip.compress(b"[]", mtime=0), mtime=0), "compressed twice"),
        (gzip.compress(b'[{"id": "' + bytes(1 << 23), mtime=0), "unpacks to over"),
        (gzip.compress(b" " * (1 << 23), mtime=0), "unpacks to over"),
        (b'[{"id": 1}] x', "ends before 'x'"),
        (b'[{"id": 1}', "it is cut"),
        (b'[{"id": "', "it is cut"),
    ],
)
def test_what_is_no_annotation_file_is_named(tmp_path, data, words):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(AnnotationFileError, match="a.json: ") as raised:
        list(read_json_samples(path))
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_bounds_of_a_sample(monkeypatch):
    monkeypatch.setattr(json_samples, "MAX_SAMPLE", 1000)
    deep = json.loads("[" * MAX_DEPTH + "]" * MAX_DEPTH)
    for value, good in (({"a": "x" * 900}, True), ({"a": "x" * 2000}, False), ([[deep]], False), (deep, True)):
        text = json.dumps([GOOD[0], value, GOOD[2]])
        for found in (
            list(parse_list("a.json", (text[at : at + 300] for at in range(0, len(text), 300)))),
            list(parse_lines([json.dumps(item) + "\n" for item in (GOOD[0], value, GOOD[2])])),
        ):
            assert [found[0], found[2], len(found)] == [GOOD[0], GOOD[2], 3]
            assert found[1] == value if good else found[1].reason == "bad_sample"
