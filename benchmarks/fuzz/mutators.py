"""Damage a file, as a seeded random generator decides."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.fuzz.forgeries import forge

INTEGERS = (0, -1, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, -(2**63), 2**40)
NUMBERS = (
    "1e999",
    "-1e999",
    "-1",
    "0",
    "NaN",
    "9" * 30,
    "9" * 5000,
    "1e-320",
    str(2**31),
    str(2**63),
    "0.5",
    "true",
    "null",
)
VALUES = (
    "null",
    "[]",
    "{}",
    "0",
    '""',
    "true",
    '"\\ud800"',
    '"../../../etc/passwd"',
    '"\\u0000"',
    "[[]]",
    '{"a": 1}',
    "1e400",
)
WORDS = (
    "null",
    "[]",
    "{}",
    "0",
    "'../../../etc'",
    "!!python/object/apply:os.system [true]",
    "&a [*a, *a]",
    "1e999",
    ".nan",
)
FORGED = 0.04  #: share of mutants that are forgeries, where there is one for the kind of file
DEPTHS = (2000, 100_000)
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
WORD = re.compile(r"[A-Za-z_][\w./-]*")


def mutate(folder: Path, files: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Damage one of ``files`` below ``folder``; return its name and what was done."""
    for _ in range(50):
        name = rng.choice(files)
        path = folder / name
        data = path.read_bytes()
        is_text = b"\0" not in data and _is_text(data)
        kind = forge if rng.random() < FORGED else rng.choice(_kinds(is_text, rng))
        done = kind(path, data, rng, [folder / other for other in files])
        if done and (not path.is_file() or path.read_bytes() != data):
            return name, f"{kind.__name__} {done}"
    raise RuntimeError(f"{folder}: no damage changes its files")


def _kinds(is_text: bool, rng: random.Random) -> Sequence[Mutator]:
    """Choose a group of mutators."""
    if is_text and rng.random() < 0.6:
        return TEXT
    return BYTES if rng.random() < 0.92 else WHOLE


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _span(data: bytes, rng: random.Random) -> tuple[int, int]:
    """Choose a block: its first byte, and the byte after its last."""
    first = rng.randrange(len(data) + 1)
    return first, min(len(data), first + rng.choice((1, 4, 16, 64, 512, 4096)))


# bytes: each returns what it did, or an empty text if it does not fit ------------------------------------------------


def flip_bits(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    changed = bytearray(data)
    places = [rng.randrange(len(data)) for _ in range(rng.choice((1, 1, 1, 3, 10)))] if data else []
    for place in places:
        changed[place] ^= 1 << rng.randrange(8)
    path.write_bytes(changed)
    return f"at {places}" if places else ""


def replace_bytes(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    first, end = _span(data, rng)
    path.write_bytes(data[:first] + rng.randbytes(end - first) + data[end:])
    return f"{first}:{end}"


def cut_off(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    size = rng.choice((rng.randrange(len(data) + 1), max(0, len(data) - rng.randrange(1, 64))))
    path.write_bytes(data[:size])
    return f"to {size} of {len(data)}"


def zero_block(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    first, end = _span(data, rng)
    path.write_bytes(data[:first] + bytes(end - first) + data[end:])
    return f"{first}:{end}"


def duplicate_block(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    first, end = _span(data, rng)
    path.write_bytes(data[:end] + data[first:end] + data[end:])
    return f"{first}:{end}"


def remove_block(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    first, end = _span(data, rng)
    path.write_bytes(data[:first] + data[end:])
    return f"{first}:{end}"


def swap_blocks(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    size = rng.choice((4, 64, 512))
    if len(data) < 2 * size:
        return ""
    first = rng.randrange(len(data) - 2 * size + 1)
    second = rng.randrange(first + size, len(data) - size + 1)
    blocks = data[second : second + size], data[first + size : second], data[first : first + size]
    path.write_bytes(data[:first] + b"".join(blocks) + data[second + size :])
    return f"{size} bytes at {first} and {second}"


def write_integer(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    value, size, order = rng.choice(INTEGERS), rng.choice((2, 4, 8)), rng.choice(("little", "big"))
    if len(data) < size:
        return ""
    place = rng.randrange(min(len(data) - size + 1, rng.choice((64, 1024, len(data)))))
    number = (value % (1 << 8 * size)).to_bytes(size, "little" if order == "little" else "big")
    path.write_bytes(data[:place] + number + data[place + size :])
    return f"{value} in {size} {order}-endian bytes at {place}"


def splice(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    other = rng.choice(files)
    content = other.read_bytes()
    first, end = _span(content, rng)
    place = rng.randrange(len(data) + 1)
    path.write_bytes(data[:place] + content[first:end] + data[place + end - first :])
    return f"{first}:{end} of {other.name} at {place}"


def empty(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    path.write_bytes(b"")
    return "it"


def become_folder(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    path.unlink()
    path.mkdir()
    return "of this name"


def remove(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    path.unlink()
    return "it"


def become_other(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    other = rng.choice(files)
    shutil.copyfile(other, path) if other != path else None
    return f"{other.name}"


# text: likewise --------------------------------------------------------------------------------------------------


def _replace_match(
    pattern: re.Pattern[str], choices: Sequence[str], path: Path, data: bytes, rng: random.Random
) -> str:
    text = data.decode()
    matches = list(pattern.finditer(text))
    if not matches:
        return ""
    match, value = rng.choice(matches), rng.choice(choices)
    path.write_text(text[: match.start()] + value + text[match.end() :], encoding="utf-8")
    return f"{match.group()[:40]!r} at {match.start()} by {value[:40]!r}"


def change_number(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    return _replace_match(NUMBER, NUMBERS, path, data, rng)


def change_string(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    return _replace_match(STRING, VALUES, path, data, rng)


def change_word(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    return _replace_match(WORD, WORDS, path, data, rng)


def nest_deeply(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    depth = rng.choice(DEPTHS)
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = opened * depth + ("0" if opened != "[" else "") + (closed * depth if rng.random() < 0.8 else "")
    return _replace_match(rng.choice((NUMBER, STRING)), (inner,), path, data, rng)


def repeat_line(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    lines = data.decode().split("\n")
    first, place = rng.randrange(len(lines)), rng.randrange(len(lines) + 1)
    path.write_text("\n".join([*lines[:place], lines[first], *lines[place:]]), encoding="utf-8")
    return f"{first} at {place}"


def change_structure(path: Path, data: bytes, rng: random.Random, files: Sequence[Path]) -> str:
    """Replace, remove or repeat one value of a JSON document, or of one line of JSON lines."""
    lines = [data.decode()]
    try:
        value = json.loads(lines[0])
        number = 0
    except ValueError:
        lines = data.decode().split("\n")
        number = rng.randrange(len(lines))
        try:
            value = json.loads(lines[number])
        except ValueError:
            return ""
    places = list(_places(value))
    if not places:
        return ""
    parent, key = rng.choice(places)
    action = rng.choice(("replace", "replace", "remove", "repeat"))
    if action == "remove":
        del parent[key]
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(0, parent[key])
    else:
        other, place = rng.choice(places)
        parent[key] = rng.choice((None, True, -1, 2**63, 1e308, "", "\0", [], {}, "x" * 10_000, other[place]))
        if parent[key] is parent or _contains(parent[key], parent):
            parent[key] = None
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines), encoding="utf-8")
    return f"{action} {key!r:.40}"


def _places(value: Any) -> list[tuple[Any, Any]]:
    """List (parent, key) of all values inside a JSON value, at most 5,000."""
    found: list[tuple[Any, Any]] = []
    pending = [value]
    while pending and len(found) < 5000:
        parent = pending.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent)) if isinstance(parent, list) else ()
        for key in keys:
            found.append((parent, key))
            pending.append(parent[key])
    return found


def _contains(value: Any, other: Any) -> bool:
    return any(parent[key] is other for parent, key in _places(value))


Mutator = Callable[[Path, bytes, random.Random, Sequence[Path]], str]
BYTES: tuple[Mutator, ...] = (flip_bits, flip_bits, replace_bytes, cut_off, zero_block, duplicate_block, remove_block)
BYTES += (swap_blocks, write_integer, write_integer, splice)
WHOLE: tuple[Mutator, ...] = (empty, become_folder, remove, become_other, become_other)
TEXT: tuple[Mutator, ...] = (change_number, change_number, change_string, change_word, nest_deeply, repeat_line)
TEXT += (change_structure, change_structure, change_structure)
