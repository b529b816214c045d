"""YAML of unknown origin: the meanings of YAML 1.2's core schema, places, and bounds on work."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.utils.yaml_parser import (
    MAX_BYTES,
    MAX_DEPTH,
    YamlFormatError,
    dump_yaml,
    find_place,
    parse_yaml,
)

#: text -> its value; from chapter 10.3.2 of the specification of YAML 1.2.2
CORE = {
    "null": None,
    "~": None,
    "": None,
    "nil": "nil",
    "true": True,
    "True": True,
    "FALSE": False,
    **{text: text for text in ("yes", "no", "on", "off", "y", "n", "YES", "tRUE")},
    "0": 0,
    "-19": -19,
    "+12": 12,
    "010": 10,
    "0o14": 12,
    "0o8": "0o8",
    "0x3A": 58,
    "0b1": "0b1",
    **{text: text for text in ("1:30", "190:20:30", "1_000", "1,000", "2001-12-14", "=", "1e", "0x", "1__0")},
    "1e-5": 1e-5,
    "12e03": 12000.0,
    "-2E+05": -200000.0,
    ".5": 0.5,
    "0.": 0.0,
    ".inf": math.inf,
    "-.INF": -math.inf,
    "inf": "inf",
    "nan": "nan",
    "'010'": "010",
    '"true"': "true",
}


@pytest.mark.parametrize(("text", "value"), CORE.items())
def test_plain_text_has_its_value_in_the_core_schema(text, value):
    found = parse_yaml(f"field: {text}")["field"]
    assert (found, type(found)) == (value, type(value))
    assert math.isnan(parse_yaml("[.nan]")[0])


def test_names_of_fields_are_text():
    assert parse_yaml("{010: a, 1e3: b, ~: c, true: d}") == {"010": "a", "1e3": "b", "~": "c", "true": "d"}


def test_anchors_and_merge_keys():
    text = "a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\nd: {<<: [*a, {z: 4}], x: 0}\n"
    value = parse_yaml(text)
    assert value == yaml.safe_load(text)
    assert value["c"] == {"x": 1, "y": 3} and value["d"] == {"x": 0, "y": 2, "z": 4}


def test_fields_know_their_place():
    value = parse_yaml("# first\na: {b: 1}\nc:\n  - d: 1\n  - e: 2\n    f: 3\n", "m.yaml")
    assert [find_place(value, path) for path in ("a", "a.b", "a.x", "c[1].f: wrong", "c[1].x", "c[7]", "z")] == [
        "m.yaml:2",
        "m.yaml:2",
        "m.yaml:2",
        "m.yaml:6",
        "m.yaml:5",
        "m.yaml:3",
        "m.yaml",
    ]


BOMB = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))])
MERGES = "\n".join(["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 9))])
CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [[[*a{n - 1}]]]" for n in range(1, 400))])


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: 2\na: 3", 3, "`a` is given twice"),
        ("a: {x: 1, x: 2}", 1, "`x` is given twice"),
        (BOMB, 1, "aliases repeat"),
        (MERGES, 1, "aliases repeat"),
        (CHAIN, 1, f"more than {MAX_DEPTH} nested values"),
        ("[" * 100_000, 1, f"more than {MAX_DEPTH} nested values"),
        ("\n" + "- " * 1000, 2, f"more than {MAX_DEPTH} nested values"),
        ("a: &a [*a]", 1, "an alias that contains itself"),
        ("a: &a {<<: *a}", 1, "an alias that contains itself"),
        ("a: *b", 1, "found undefined alias"),
        ("x" * (MAX_BYTES + 1), 1, "more than"),
        ("a: " + "1" * 5000, 1, "too many digits"),
        ("\n\na: !!python/object/apply:os.system [x]", 3, "values of the type"),
        ("a: !!timestamp 2001-12-14", 1, "values of the type"),
        ("a: !!binary aGk=", 1, "values of the type"),
        ("!!python/name:os.x a: 1", 1, "the name of a field must be text"),
        ("[a]: 1", 1, "the name of a field must be text"),
        ("a: 1\n\x07b: 2", 2, "control character U+0007"),
        ('a: "x\\0y"', 1, "null character"),
        ('a: "\\ud800"', 1, "half a character"),
        ('a: "\\U00110000"', 1, ""),
        ("a: 1\n---\nb: 2", 2, "single document"),
        ("a:\n\tb: 1", 2, "indent with spaces"),
        ("a: b: c", 1, "quote text"),
        ('a: "C:\\data"', 1, "single quotes"),
        (b"a: 1\nb: \xff", 2, "not UTF-8 text"),
        ("a: 1".encode("utf-16"), 1, "not UTF-8 text"),
        (b"a: 1\nb: [\n", 3, "expected the node content"),
    ],
    ids=range(28),
)
def test_text_that_is_refused_names_its_line(text, line, reason):
    with pytest.raises(YamlFormatError) as caught:
        parse_yaml(text)
    message = str(caught.value)
    assert (caught.value.line, len(message.splitlines())) == (line, 1) and reason in message and len(message) < 400


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words
texts = st.sampled_from([text for text in CORE if not text.startswith(("'", '"'))])
values = st.recursive(scalars | texts, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=8)


@given(values)
def test_what_is_written_is_read_back_by_both_versions(value):
    written = dump_yaml(value)
    assert yaml.safe_load(written) == value
    assert parse_yaml(written) == value
