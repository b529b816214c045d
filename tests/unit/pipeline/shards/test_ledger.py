"""The ledger: a fixed vocabulary, and rows that survive any text."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest

from framestream.pipeline.media.errors import REASONS as MEDIA_REASONS
from framestream.pipeline.shards.ledger import (
    LEDGER_FILE,
    REASONS,
    LedgerError,
    LedgerRow,
    ledger_table,
    read_ledger,
    write_ledger,
)
from framestream.pipeline.utils.digests import file_digest
from framestream.pipeline.utils.records import write_record


def test_every_reason_of_a_decoder_is_a_reason_of_the_ledger():
    assert set(MEDIA_REASONS) <= set(REASONS)


def test_rows_come_back_as_they_were_written(tmp_path):
    rows = [
        LedgerRow("set", "media", "corrupt", "line", key="v1", source="root/ä.mp4", attempts=2),
        LedgerRow("set", "dialogue", "bad_sample", "half \ud800 a pair", dialogue="\udfff"),
    ]
    write_ledger(tmp_path / "ledger" / "ledger.parquet", ledger_table(rows))
    found = read_ledger(tmp_path).to_pylist()
    assert found[0] == rows[0].columns() and found[0]["source"] == "root/ä.mp4" and found[0]["attempts"] == 2
    assert found[1]["message"] == "half \\ud800 a pair" and found[1]["dialogue"] == "\\udfff"


def test_an_empty_ledger_has_its_columns(tmp_path):
    write_ledger(tmp_path / "ledger" / "ledger.parquet", ledger_table([]))
    schema = pq.read_schema(tmp_path / "ledger" / "ledger.parquet")
    assert schema.names == ["entry", "dialogue", "key", "source", "kind", "reason", "message", "attempts"]


@pytest.mark.parametrize(("kind", "reason"), [("media", "bad luck"), ("video", "corrupt")])
def test_unknown_words_are_refused(kind, reason):
    with pytest.raises(ValueError, match="is unknown; add it"):
        LedgerRow("set", kind, reason, "")


@pytest.mark.parametrize("has_digest", [True, False])
def test_damage_is_one_line_or_changes_nothing(tmp_path, has_digest):
    """With the digest in build.json every change is found; without it, as in older roots, the pages have checksums."""
    path = tmp_path / LEDGER_FILE
    write_ledger(path, ledger_table(LedgerRow("set", "media", "corrupt", f"line {n}", key=f"v{n}") for n in range(40)))
    sound, data = read_ledger(tmp_path), path.read_bytes()
    if has_digest:
        write_record(tmp_path / "build.json", {"digests": {LEDGER_FILE: file_digest(path)}})
    rng = np.random.default_rng(1)
    damaged = [b"", data[:-1], data + b"x", data[: len(data) // 2], b"PAR1"]
    for place in rng.integers(0, len(data), 60).tolist():
        damaged.append(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
    for other in damaged:
        path.write_bytes(other)
        try:
            rows = read_ledger(tmp_path)
        except LedgerError as error:
            assert str(error).startswith(f"{path}: ") and str(error).endswith("build it again")
            assert "\n" not in str(error)
        else:
            assert not has_digest
            assert rows.equals(sound)


def test_a_ledger_that_is_missing_is_named(tmp_path):
    with pytest.raises(LedgerError, match=f"{LEDGER_FILE}: no ledger here; restore it"):
        read_ledger(tmp_path)
