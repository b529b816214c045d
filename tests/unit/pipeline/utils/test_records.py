"""Records: what is written is read, and no damage of any byte is taken for something else."""

import json
import logging

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from framestream.pipeline.utils.digests import bytes_digest, file_digest, frame_digest
from framestream.pipeline.utils.records import RecordError, load_json, parse_record, read_record, write_record

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=8,
)
RECORD = {"step": 12, "loss": 0.1, "name": "é 漢", "digests": {"a.arrow": "00ff"}, "list": [1, None, True]}


@given(record=st.dictionaries(st.text(max_size=5).filter(lambda name: name != "digest"), VALUES, max_size=4))
def test_records_come_back(tmp_path_factory, record):
    path = tmp_path_factory.mktemp("record") / "a.json"
    write_record(path, record)
    assert read_record(path, "record", "write it again") == record
    assert json.loads(path.read_bytes()) == {**record, "digest": json.loads(path.read_bytes())["digest"]}


def test_the_digest_is_that_of_compact_json(tmp_path):
    write_record(tmp_path / "a.json", RECORD)
    text = json.dumps(RECORD, sort_keys=True, separators=(",", ":"))
    assert json.loads((tmp_path / "a.json").read_bytes())["digest"] == xxhash.xxh3_64(text.encode()).hexdigest()


def test_each_changed_byte_is_found_or_changes_nothing(tmp_path, caplog):
    write_record(tmp_path / "a.json", RECORD)
    data = (tmp_path / "a.json").read_bytes()
    for place in range(len(data)):
        for changed in (data[place] ^ 1, ord("0"), ord(" ")):
            damaged = data[:place] + bytes([changed]) + data[place + 1 :]
            caplog.clear()
            try:
                found = parse_record(damaged, f"a{place}-{changed}.json", "record", "write it again")
            except RecordError as error:
                assert str(error).startswith(f"a{place}-{changed}.json: ") and "\n" not in str(error)
            else:
                assert found == RECORD or "has no digest" in caplog.text


def test_a_record_without_digest_is_read_and_said_once(tmp_path, caplog):
    (tmp_path / "a.json").write_text(json.dumps(RECORD))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert read_record(tmp_path / "a.json", "record", "write it again") == RECORD
    assert caplog.text.count("has no digest") == 1


@pytest.mark.parametrize(
    "data", [b"", b" \n", b"[]", b"3", b"{", b'{"a": ' + b"[" * 200_000, b"\xff\xfe", b'{"digest": 3}']
)
def test_what_is_no_record_is_one_line(data):
    with pytest.raises(RecordError, match=r"^a\.json: (not a|damaged) record \(.*\); write it again$"):
        parse_record(data, "a.json", "record", "write it again")


def test_values_that_are_not_finite_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_json_that_is_too_deep_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deep"):
        load_json("[" * 200_000)


def test_digests_of_files_are_those_of_their_bytes(tmp_path):
    data = bytes(range(256)) * 40_000  # more than is read at a time
    (tmp_path / "a").write_bytes(data)
    assert file_digest(tmp_path / "a") == bytes_digest(data) == xxhash.xxh3_64(data).hexdigest()
    assert frame_digest(memoryview(data)) == int(bytes_digest(data), 16) % 2**32
