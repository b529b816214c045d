"""Mapped Arrow files: a file that was damaged is an error of one line, never other values or a crash."""

import random

import numpy as np
import pyarrow as pa
import pytest

from framestream.pipeline.utils.arrow_mmap import MappedTable
from framestream.pipeline.utils.digests import file_digest

SCHEMA = pa.schema([("key", pa.string()), ("times", pa.list_(pa.float64())), ("size", pa.int32())])


@pytest.fixture
def path(tmp_path):
    rows = [{"key": f"v{number}é", "times": [0.5] * (number % 4), "size": number} for number in range(50)]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for start in range(0, 50, 20):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 20], SCHEMA))
    return tmp_path / "a.arrow"


def test_columns_are_those_of_the_file(path):
    mapped = MappedTable(path, file_digest(path))
    assert mapped.table.schema == SCHEMA
    sizes = mapped.array("size")
    assert sizes.dtype == np.int32 and sizes.tolist() == list(range(50))


def damage(rng, data):
    place = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    if kind == 1:
        return data[:place] + b"\xff\xff\xff\x7f" + data[place + 4 :]
    return data[:place] if kind == 2 else data[:place] + data[place + rng.randrange(1, 64) :]


def test_each_damage_is_found_by_the_digest(path):
    digest, data, rng = file_digest(path), path.read_bytes(), random.Random(1)
    for _ in range(200):
        damaged = damage(rng, data)
        path.write_bytes(damaged)
        if damaged != data:
            with pytest.raises(ValueError, match=r"a\.arrow: ") as raised:
                MappedTable(path, digest)
            assert "\n" not in str(raised.value)


def test_without_digest_all_that_is_opened_can_be_read(path):
    data, rng, opened = path.read_bytes(), random.Random(2), 0
    for _ in range(400):
        path.write_bytes(damage(rng, data))
        try:
            table = MappedTable(path).table
        except ValueError as error:
            assert "a.arrow: " in str(error) and "\n" not in str(error)
        else:
            opened += 1
            table.to_pylist()
    assert opened


@pytest.mark.parametrize("content", [b"", b"ARROW1", b"<html>", b"PAR1" * 20])
def test_other_files_are_one_line(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.arrow: .*not an Arrow file"):
        MappedTable(path)
