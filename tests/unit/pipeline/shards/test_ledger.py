"""The ledger: a fixed vocabulary, and rows that survive any text."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from framestream.pipeline.media.errors import REASONS as MEDIA_REASONS
from framestream.pipeline.shards.ledger import REASONS, LedgerRow, ledger_table, read_ledger, write_ledger


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
