"""The dataset card of a shard root: ``README.md`` with a front matter that the hub and ``datasets`` read.

The front matter has a config for each folder, so ``load_dataset`` opens the root, and the hub shows it. Below stand
counts, and how the root was built. Only the field ``configs`` and the part between two markers are generated. All other
text is the user's, and stays when shards are added. The same root gives the same card.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from framestream.pipeline.utils.atomic_io import write_atomic
from framestream.pipeline.utils.yaml_parser import YamlFormatError, dump_yaml, parse_yaml

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
MAX_CARD_BYTES = 1 << 20  #: of a card that is read
BEGIN = "<!-- framestream begin: this part is generated, and replaced when shards are added -->"
END = "<!-- framestream end -->"
FOLDERS = ("video", "image", "dialogue")  #: configs; the first that the root has is the default
COUNTS = ("shards", "samples", "frames", "bytes")

_FRONT_MATTER = re.compile(r"---[ \t]*\n(.*?)(?:^---[ \t]*(?:\n|\Z))", re.S | re.M)
_OWN_FIELD = re.compile(r"""(["']?)configs\1\s*:""")
_INTRODUCTION = """
# A shard root of framestream

Describe the data here: where they come from, and what they may be used for. State `license:` in the front matter above.
Everything outside of the generated part is yours.
"""
_MEMBERS = """\
A sample of `video` is `KEY.mp4` and `KEY.json`, one of `image` is `KEY.jpg` and `KEY.json`. One of `dialogue` is
`KEY.json`, with the conversation and the keys of its media. An MP4 has only the frames that the sampler takes, each a
complete JPEG. `index/` has the byte range of every frame. Split `val` is held out.
"""
_USE = """\
## How to open it

[framestream](https://github.com/framestream/framestream) wrote these shards. It streams them into the training of video
models, and other loaders can read them too.

```sh
pip install framestream datasets
```

```python
from datasets import {types}load_dataset
from framestream.pipeline.adapters import ShardDataset, read_members

rows = load_dataset("OWNER/NAME", "{config}", split="{split}", streaming=True)
{cast}sample = read_members(next(iter(rows)), frames={frames})
samples = ShardDataset("hf://datasets/OWNER/NAME", frames={frames})
```

`OWNER/NAME` is this data set on the hub, or replace both by the folder of the root.
"""
#: by config: the column that ``datasets`` would decode, and the name of its type
_UNDECODED = {"video": ("mp4", "Video"), "image": ("jpg", "Image")}


class CardError(ValueError):
    """A card cannot be made from the one that is there; one line with the reason and the fix."""


def write_dataset_card(root: Path, record: Mapping[str, Any], shards: pa.Table, media: pa.Table) -> None:
    """Write the card of ``root``, completely or not at all. Keep what the user wrote in the one that is there.

    A card that cannot be kept, such as one with damaged front matter, stays as it is, and the log says why.

    Args:
        record: contents of build.json.
        shards: table of the index.
        media: table of the index.
    """
    path = root / CARD_FILE
    try:
        text = render_dataset_card(record, shards, media, read_card(path))
    except CardError as error:
        logger.warning("%s: %s; the card is not written", path, error)
        return
    write_atomic(path, text.encode())


def read_card(path: Path) -> str:
    """Return the text of a card; empty if there is no card.

    Raises:
        CardError: it is a link, too large, or not UTF-8.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CardError("is not a regular file; move it away")
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        data = file.read(MAX_CARD_BYTES + 1)
    return decode_card(data)


def decode_card(data: bytes) -> str:
    """Return the text of a card that was read as bytes, with ``\\n`` at the end of each line.

    Raises:
        CardError: it is too large, or not UTF-8.
    """
    if len(data) > MAX_CARD_BYTES:
        raise CardError(f"has over {MAX_CARD_BYTES:,} bytes; make it shorter")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise CardError("is not UTF-8; save it as UTF-8") from None


def render_dataset_card(record: Mapping[str, Any], shards: pa.Table, media: pa.Table, previous: str = "") -> str:
    """Return the card of a root. See :func:`write_dataset_card`; ``previous`` is the text of the card that is there.

    Raises:
        CardError: the front matter of ``previous`` is not valid YAML, or one of its two markers is missing.
    """
    counts = _count(shards, media)
    configs = dump_yaml({"configs": _configs(counts)})
    generated = "\n".join(
        [BEGIN, _describe_contents(counts), _describe_use(counts, record), _describe_build(record), END]
    )
    return _assemble(previous, configs, generated)


def merge_cards(card: str, other: str) -> str:
    """Return ``card`` with what users wrote in another card of the same root, such as the one on the hub.

    Raises:
        CardError: both have text of users, and it differs, or one of them is damaged.
    """
    own, others = _users_part(card), _users_part(other)
    if own == others or others in (_UNTOUCHED, ("", "", "")):
        return card
    if own != _UNTOUCHED:
        raise CardError("was edited here and there; make the parts outside of the generated one equal")
    _, configs, body = _split_card(card)
    return _assemble(other, configs, _split_body(body)[1])


def _assemble(previous: str, configs: str, generated: str) -> str:
    """Put the generated parts into the card ``previous``, or into a new one."""
    front, _, body = _split_card(previous)
    before, found, after = _split_body(body)
    if not found:
        before, after = (before if previous else _INTRODUCTION).rstrip("\n") + "\n\n", "\n"
    return f"---\n{front}{configs}---\n{before}{generated}{after}"


def _users_part(card: str) -> tuple[str, str, str]:
    front, _, body = _split_card(card)
    before, _, after = _split_body(body)
    return front.strip(), before.strip(), after.strip()


_UNTOUCHED = ("", _INTRODUCTION.strip(), "")


def _split_body(body: str) -> tuple[str, str, str]:
    """Return what stands before the generated part, the generated part with its markers, and what stands behind it.

    Raises:
        CardError: one of the markers is missing, or there are several.
    """
    if BEGIN not in body and END not in body:
        return body, "", ""
    before, begin, rest = body.partition(BEGIN)
    generated, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise CardError(f"needs the lines {BEGIN} and {END} once each, in this order; restore them or remove it")
    return before, begin + generated + end, after


def _split_card(text: str) -> tuple[str, str, str]:
    """Return what is the user's in the front matter of a card, the field ``configs``, and the body.

    Raises:
        CardError: the front matter is not valid YAML, or not an object.
    """
    found = _FRONT_MATTER.match(text)
    if not found:
        return "", "", text
    kept: list[str] = []
    configs: list[str] = []
    own = False
    for line in found[1].splitlines(keepends=True):
        if re.match(r"[^\s#-]", line):
            own = _OWN_FIELD.match(line) is not None
        (configs if own and not line.startswith("#") else kept).append(line)
    front = "".join(kept)
    try:
        fields = parse_yaml(front)
    except YamlFormatError as error:
        raise CardError(f"its front matter is not valid YAML ({error}); correct it or remove the file") from None
    if not isinstance(fields, dict | None) or "configs" in (fields or {}):
        raise CardError("its front matter is not a list of fields, one a line; correct it or remove the file")
    return front, "".join(configs), text[found.end() :]


def _count(shards: pa.Table, media: pa.Table) -> dict[tuple[str, str], dict[str, int]]:
    """Count shards, samples, frames and bytes by folder and split, in the order of the folders."""
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: dict.fromkeys(COUNTS, 0))
    for shard in shards.to_pylist():
        counts = found[shard["folder"], shard["split"]]
        counts["shards"] += 1
        counts["samples"] += shard["samples"]
        counts["bytes"] += shard["bytes"]
    frames = pa.table({"kind": media["kind"], "split": media["split"], "n": pc.list_value_length(media["timestamps"])})
    for group in frames.group_by(["kind", "split"]).aggregate([("n", "sum")]).to_pylist():
        found[group["kind"], group["split"]]["frames"] = group["n_sum"]
    order = [(folder, split) for folder in FOLDERS for split in ("train", "val")]
    return {name: found[name] for name in order if name in found}


def _configs(counts: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    """Return the front matter's configs: a folder each, with the pattern of its shards for each split."""
    configs: dict[str, dict[str, Any]] = {}
    for folder, split in counts:
        config = configs.setdefault(folder, {"config_name": folder, "data_files": []})
        config["data_files"].append({"split": split, "path": f"{folder}/{split}-*.tar"})
    for config in list(configs.values())[:1]:
        config["default"] = True
    return list(configs.values())


def _describe_contents(counts: Mapping[tuple[str, str], Mapping[str, int]]) -> str:
    rows = [[folder, split, *_numbers(values, COUNTS)] for (folder, split), values in counts.items()]
    table = _format_markdown_table(["config", "split", *COUNTS], rows)
    return f"## Contents\n\n{table}\n\n{_MEMBERS}"


def _describe_use(counts: Mapping[tuple[str, str], Any], record: Mapping[str, Any]) -> str:
    """Show how to open the root. Members stay bytes, because ``datasets`` decodes videos only with torchcodec."""
    config, split = next(iter(counts), ("dialogue", "train"))
    types = cast = ""
    if config in _UNDECODED:
        column, feature = _UNDECODED[config]
        types = f"{feature}, "
        cast = f'rows = rows.cast_column("{column}", {feature}(decode=False))\n'
    frames = None if "compat" in record["specification"] else 8
    return _USE.format(config=config, split=split, types=types, cast=cast, frames=frames)


def _describe_build(record: Mapping[str, Any]) -> str:
    """Describe how the root was built: the settings that decided its bytes, and what each entry gave."""
    specification = dict(record["specification"])
    planned = {entry["name"]: entry for entry in specification.pop("entries", ())}
    specification.pop("nested_roots", None)  # names of roots, which may be paths
    if not specification.get("limit"):
        specification.pop("limit", None)
    rows = [[f"`{name}`", _format_value(value)] for name, value in _flatten(specification)]
    settings = _format_markdown_table(["setting", "value"], rows)
    fields = ("planned", "dialogues", "media", "frames", "bytes")
    rows = [
        [
            _escape(entry["name"]),
            _escape(str(planned.get(entry["name"], {}).get("sampling", ""))),
            *_numbers(entry, fields),
        ]
        for entry in record["entries"]
    ]
    entries = _format_markdown_table(["entry", "sampling", *fields], rows)
    return (
        f"## How it was built\n\n{settings}\n\n{entries}\n\n`ledger/ledger.parquet` lists what was left out, and why.\n"
    )


def _numbers(values: Mapping[str, int], names: Sequence[str]) -> list[str]:
    return [f"{values[name]:,}" for name in names]


def _flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """Return (dotted name, value) of each value in nested objects, sorted by name."""
    if isinstance(value, Mapping) and (value or not name):
        return [item for key in sorted(value) for item in _flatten(value[key], f"{name}.{key}" if name else str(key))]
    return [(name, value)]


def _format_value(value: Any) -> str:
    return _escape("true" if value is True else "false" if value is False else str(value))


def _escape(text: str) -> str:
    """Return text of unknown origin so that Markdown and HTML show it as it is, in one line."""
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r"([\\`*_\[\]|~$!])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"))


def _format_markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---" for _ in head], *rows))
