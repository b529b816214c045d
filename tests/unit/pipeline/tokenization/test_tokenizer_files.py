"""Files of a tokenizer are input: what is too large is one line, before the tokenizer library reads it."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
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


@pytest.mark.parametrize("there", [(), ("vocab.json",), ("merges.txt",)])
def test_a_missing_vocabulary_is_named(tmp_path: Path, there: tuple[str, ...]) -> None:
    """transformers would make a tokenizer of the control tokens alone, which gives a text no tokens."""
    write_tokenizer(tmp_path / "t")
    model = json.loads((tmp_path / "t" / "tokenizer.json").read_text())["model"]
    (tmp_path / "t" / "tokenizer.json").unlink()
    contents = {"vocab.json": json.dumps(model["vocab"]), "merges.txt": "\n".join(map(" ".join, model["merges"]))}
    for name in there:
        (tmp_path / "t" / name).write_text(contents[name], encoding="utf-8")
    (missing,) = set(contents) - set(there) if there else ["tokenizer.json"]
    with pytest.raises(ManifestError, match=f"^text.tokenizer: .*: {missing} is missing; copy its files again$"):
        load_tokenizer(str(tmp_path / "t"))
    for name, content in contents.items():  # both are enough
        (tmp_path / "t" / name).write_text(content, encoding="utf-8")
    assert load_tokenizer(str(tmp_path / "t"))("red")["input_ids"]


def test_the_config_of_an_export_beside_it_is_quiet(tmp_path: Path) -> None:
    """transformers would warn about a model that it does not know, and about its fields."""
    write_tokenizer(tmp_path / "plain")
    export = shutil.copytree(tmp_path / "plain", tmp_path / "export")
    code = {"AutoConfig": "configuration_framestream.FramestreamConfig"}
    config = {"model_type": "videochat_flash_qwen", "rope_scaling": None, "rope_theta": 1e6, "auto_map": code}
    (export / "config.json").write_text(json.dumps(config), encoding="utf-8")
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("transformers")
    log.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load_tokenizer(str(export))
    finally:
        log.removeHandler(handler)
    assert [record.getMessage() for record in records] == []
    plain = load_tokenizer(str(tmp_path / "plain"))
    assert type(found) is type(plain) and found("Which colour?")["input_ids"] == plain("Which colour?")["input_ids"]
