"""Files of a tokenizer are input: what is too large is one line, before the tokenizer library reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from framestream.pipeline.config.manifest import ManifestError
from framestream.pipeline.tokenization.tokenizer_files import MAX_CONFIG_BYTES, load_tokenizer
from framestream.tools.demo.tokenizer import write_tokenizer


def test_a_large_configuration_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "sound")
    assert load_tokenizer(str(tmp_path / "sound")).is_fast
    large = shutil.copytree(tmp_path / "sound", tmp_path / "large")
    config = {f"key {number}": "x" * 1000 for number in range(MAX_CONFIG_BYTES // 1000)}
    (large / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ManifestError, match="large.*tokenizer_config.json has over 4 MiB"):
        load_tokenizer(str(large))
