"""Parse YAML of unknown origin, with the meanings of YAML 1.2's core schema and bounds on work.

``010`` is 10, ``0o10`` is 8 and ``1e-5`` is a number. ``1:30``, ``1_000``, ``2024-01-01``, ``yes`` and ``off`` are
text. PyYAML by itself follows YAML 1.1, where they are not. Names of fields are always text. A repeated field is an
error. Anchors and the merge key ``<<`` are supported.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import yaml

MAX_BYTES = 1 << 20  #: of a file
MAX_DEPTH = 64  #: nested values
MAX_REPEATED = 1 << 20  #: characters and values that aliases add
MAX_DIGITS = 400  #: of a number

_TAG = "tag:yaml.org,2002:"
#: tag of the core schema -> the plain text that has it, and its first characters; the first match counts
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": (r"<<", ["<"]),
}
_FIXES = {
    r"'\t'": "indent with spaces",
    "mapping values are not": "quote text that contains `: `",
    "unknown escape": r"write text with a \ in single quotes",
}


class YamlFormatError(ValueError):
    """Text that is not valid YAML, or more than the bounds allow; one line without the place.

    Args:
        reason: what is wrong.
        line: of the fault, from 1.
    """

    def __init__(self, reason: str, line: int = 1) -> None:
        super().__init__(" ".join(reason.split()))
        self.line = line


class LocatedDict(dict):
    """A mapping that knows where it was written.

    ``place`` is that of the mapping, and ``places`` has those of its fields: ``FILE:LINE`` or a name.
    """

    __slots__ = ("place", "places")

    def __init__(self, value: Any = (), place: str = "", places: dict[str, str] | None = None) -> None:
        super().__init__(value)
        self.place: str = place or getattr(value, "place", "")
        self.places: dict[str, str] = {**getattr(value, "places", {}), **(places or {})}


def parse_yaml(data: bytes | str, name: str = "", lines: bool = True, max_bytes: int = MAX_BYTES) -> Any:
    """Parse one YAML document in UTF-8.

    Args:
        data: the document.
        name: of its file, for the places of mappings.
        lines: whether the places of fields have the numbers of lines.
        max_bytes: largest size that is read.

    Returns:
        None, bool, int, float, str, lists of values, and :class:`LocatedDict` from text to a value.

    Raises:
        YamlFormatError: the text is not valid, or exceeds the bounds of this module.
    """
    if len(data) > max_bytes:
        raise YamlFormatError(f"more than {max_bytes:,} bytes")
    text = data if isinstance(data, str) else _decode(data)
    if control := yaml.reader.Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, control.start()) + 1
        raise YamlFormatError(f"control character U+{ord(control[0]):04X}; remove it", line)
    try:
        return _CoreLoader(text, name, lines).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ": ".join(filter(None, (error.context, error.problem)))
        fix = next((f"; {fix}" for part, fix in _FIXES.items() if part in reason), "")
        raise YamlFormatError(f"{reason:.300}{fix}", mark.line + 1 if mark else 1) from None
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # escapes such as "\U00110000"
        raise YamlFormatError(f"{error!s:.300}") from None


def dump_yaml(value: Any) -> str:
    """Write plain values as YAML that means the same to readers of YAML 1.1 and 1.2; fields keep their order."""
    return yaml.dump(value, Dumper=_BothDumper, sort_keys=False, allow_unicode=True)


def find_place(value: Any, field: str) -> str:
    """Return the place of a field in a parsed document; that of the mapping around it if it is missing there.

    Args:
        value: the document.
        field: its path such as ``data.entries[3].root``; text after ``:`` is ignored.
    """
    place = getattr(value, "place", "")
    while True:
        item = re.match(r"\[(\d{1,9})\]", field)
        if isinstance(value, dict):
            names = [name for name in value if name and re.match(rf"{re.escape(name)}(?:[.\[:]|\Z)", field)]
            if not names:
                return place
            name = max(names, key=len)
            place = getattr(value, "places", {}).get(name, place)
            value, field = value[name], field[len(name) :]
        elif isinstance(value, list) and item and int(item[1]) < len(value):
            value, field = value[int(item[1])], field[item.end() :]
            place = getattr(value, "place", "") or place
        else:
            return place
        field = field.removeprefix(".")


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise YamlFormatError(f"not UTF-8 text (byte 0x{data[error.start]:02x}); save it as UTF-8", line) from None


def _fail(reason: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


class _CoreLoader(yaml.SafeLoader):
    """Loader of the core schema. Constructors of other types than those of JSON are not registered."""

    yaml_implicit_resolvers: dict[str, list] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def __init__(self, text: str, name: str, lines: bool) -> None:
        super().__init__(text)
        self._name, self._lines = name, lines
        self._depth = 0

    def place(self, node: yaml.Node) -> str:
        """Return where a node begins."""
        return f"{self._name}:{node.start_mark.line + 1}" if self._lines else self._name

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, unless it is nested too deep."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} nested values", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping, unless a field is repeated."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.removeprefix(_TAG) not in (*_CORE, "str"):
                raise _fail("the name of a field must be text", key)
            if key.value in seen:
                raise _fail(f"`{key.value[:60]}` is given twice; keep one", key)
            seen.add(key.value)
        return node

    def get_single_data(self) -> Any:
        """Return the value of the only document, if its aliases do not make it too large."""
        node = self.get_single_node()
        if node is None:
            return None
        sizes: dict[int, tuple[int, int] | None] = {}
        size, depth = _measure(node, sizes)
        if size > MAX_REPEATED + len(self.buffer) * 4:
            raise _fail(f"its aliases repeat more than {MAX_REPEATED:,} characters", node)
        if depth > MAX_DEPTH:
            raise _fail(f"more than {MAX_DEPTH} nested values", node)
        value = self.construct_document(node)
        if isinstance(value, LocatedDict):
            value.place = self._name
        return value


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Return (values and characters, depth) of a node; ``known`` has earlier nodes, and None for those above it."""
    if id(node) in known:
        measured = known[id(node)]
        if measured is None:
            raise _fail("an alias that contains itself", node)
        return measured
    known[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        measured = 1 + len(node.value), 1
    else:
        items = [item for pair in node.value for item in (pair if isinstance(pair, tuple) else (pair,))]
        parts = [_measure(item, known) for item in items]
        measured = 1 + sum(size for size, _ in parts), 1 + max((depth for _, depth in parts), default=0)
    known[id(node)] = measured
    return measured


def _construct_mapping(loader: _CoreLoader, node: yaml.Node) -> LocatedDict:
    if not isinstance(node, yaml.MappingNode):
        raise _fail("expected a mapping", node)
    loader.flatten_mapping(node)
    value, places = {}, {}
    for key, item in node.value:
        name = _check_text(key)
        value[name], places[name] = loader.construct_object(item, deep=True), loader.place(key)
    return LocatedDict(value, loader.place(node), places)


def _construct_list(loader: _CoreLoader, node: yaml.SequenceNode) -> list:
    return loader.construct_sequence(node, deep=True)


def _construct_text(loader: _CoreLoader, node: yaml.ScalarNode) -> str:
    loader.construct_scalar(node)
    return _check_text(node)


def _check_text(node: yaml.ScalarNode) -> str:
    if re.search("[\0\ud800-\udfff]", node.value):
        raise _fail("text with a null character or half a character", node)
    return node.value


def _construct_number(loader: _CoreLoader, node: yaml.ScalarNode) -> int | float:
    text = loader.construct_scalar(node)
    if len(text) > MAX_DIGITS:
        raise _fail("a number of too many digits", node)
    if re.fullmatch(_CORE["int"][0], text):
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    if re.fullmatch(_CORE["float"][0], text):
        return float(re.sub(r"\.(?=[in])", "", text.lower()))
    raise _fail(f"{text!r:.40} is not a number", node)


def _construct_bool(loader: _CoreLoader, node: yaml.ScalarNode) -> bool:
    text = loader.construct_scalar(node)
    if not re.fullmatch(_CORE["bool"][0], text):
        raise _fail(f"{text!r:.40} is not true or false", node)
    return text.lower() == "true"


def _construct_other(loader: _CoreLoader, node: yaml.Node) -> None:
    raise _fail(f"values of the type {node.tag.removeprefix(_TAG)!r:.60} are refused", node)


class _BothDumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as another type."""

    yaml_implicit_resolvers = {first: list(known) for first, known in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value in full."""
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Write text; PyYAML takes some line breaks of Unicode for spaces unless they are escaped."""
        style = '"' if re.search("[\x85\u2028\u2029]", data) else None
        return self.represent_scalar(_TAG + "str", data, style)


for _name, (_pattern, _first) in _CORE.items():
    for _class in (_CoreLoader, _BothDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_constructors: dict[str, Any] = {
    "null": yaml.SafeLoader.construct_yaml_null,
    "bool": _construct_bool,
    "int": _construct_number,
    "float": _construct_number,
    "str": _construct_text,
    "seq": _construct_list,
    "map": _construct_mapping,
}
for _name, _construct in _constructors.items():
    _CoreLoader.add_constructor(_TAG + _name, _construct)
_CoreLoader.add_constructor(None, _construct_other)
_BothDumper.add_representer(str, _BothDumper.represent_str)
