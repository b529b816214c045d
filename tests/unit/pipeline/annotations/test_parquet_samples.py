"""Rows of parquet files as plain values: any type of column, and no file that unpacks to much more than its size."""

import datetime
import decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from framestream.pipeline.annotations.normalize import AnnotationError
from framestream.pipeline.annotations.parquet_samples import count_parquet_samples, read_parquet_samples, to_values
from framestream.pipeline.annotations.text_files import AnnotationFileError

PLAIN = [
    pa.array([1, None, 3], pa.int8()),
    pa.array([2**63, None], pa.uint64()),
    pa.array(["a", None, "é"], pa.large_string()),
    pa.array(["a", "b", "a", None]).dictionary_encode(),
    pa.array([[1, 2], [], None, [3]], pa.list_(pa.int32())),
    pa.array([[1, 2], [], None, [3]], pa.large_list(pa.int64())),
    pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)),
    pa.array([{"a": 1, "b": ["x"]}, None, {"a": None, "b": None}]),
    pa.array([datetime.date(2024, 2, 3), None]),
    pa.array([decimal.Decimal("1.50"), None]),
    pa.array([b"ab", None], pa.binary()),
    pa.array([None, None], pa.null()),
    pa.array([1.5, None], pa.float32()),
]


@pytest.mark.parametrize("array", PLAIN, ids=lambda array: str(array.type))
def test_values_are_those_of_pyarrow(array):
    assert to_values(array) == array.to_pylist()
    for start in range(len(array)):
        assert to_values(array.slice(start, 2)) == array.slice(start, 2).to_pylist()


def test_maps_are_lists_of_pairs():
    array = pa.array([[("a", 1)], None, [("b", 2), ("c", None)]], pa.map_(pa.string(), pa.int32()))
    assert to_values(array) == [[["a", 1]], None, [["b", 2], ["c", None]]]


def test_what_python_has_no_value_for_is_text():
    nanoseconds = pa.array([1_700_000_000_123_456_789, None], pa.int64()).cast(pa.timestamp("ns"))
    assert to_values(nanoseconds) == ["2023-11-14 22:13:20.123456789", None]
    late = pa.array([10**6 * 366, 0], pa.int32()).view(pa.date32())
    first, second = to_values(late)
    assert isinstance(first, str) and second == datetime.date(1970, 1, 1)


def test_rows_come_back_with_unused_columns_of_odd_types(tmp_path):
    times = pa.array([1, 2], pa.int64()).cast(pa.timestamp("ns"))
    pq.write_table(pa.table({"id": ["a", "b"], "when": times}), tmp_path / "a.parquet")
    assert [row["id"] for row in read_parquet_samples(tmp_path / "a.parquet")] == ["a", "b"]
    assert count_parquet_samples(tmp_path / "a.parquet") == 2


def test_a_row_beyond_the_limit_costs_itself_alone(tmp_path):
    texts = ["a", "x" * (17 << 20), "b"]
    pq.write_table(pa.table({"id": texts}), tmp_path / "a.parquet", compression="none")
    found = list(read_parquet_samples(tmp_path / "a.parquet"))
    assert found[0] == {"id": "a"} and found[2] == {"id": "b"} and isinstance(found[1], AnnotationError)


def test_a_text_repeated_through_a_dictionary_is_refused(tmp_path):
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array(["x" * 100_000]))
    pq.write_table(pa.table({"id": text}), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    with pytest.raises(AnnotationFileError, match="a.parquet: unpacks to much more than its size"):
        for _ in read_parquet_samples(tmp_path / "a.parquet"):
            assert pa.total_allocated_bytes() - before < 1 << 30


@pytest.mark.parametrize("nested", [False, True])
def test_a_text_in_a_column_of_dictionary_type_is_refused(tmp_path, nested):
    """Arrow gives such a column back with its dictionary, whose text it counts once."""
    rows = 3000
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["a" * (1 << 20)]))
    column = pa.StructArray.from_arrays([texts], ["name"]) if nested else texts
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"id": column}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(AnnotationFileError, match="rows.parquet: unpacks to much more than its size"):
        list(read_parquet_samples(path))
