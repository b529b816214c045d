"""The house rules: rooms and the arrows between them, sizes, one meaning for a name, tests that stand alone."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

PACKAGES = ("pipeline", "trainer", "tools")
#: rooms from top to bottom; a room imports rooms of lower lines only. A package's own name means its command modules.
LAYERS = (
    ("trainer", "tools"),
    ("trainer/training",),
    (
        "trainer/evaluation",
        "trainer/serving",
        "tools/builder",
        "tools/demo",
        "tools/export",
        "tools/inspection",
        "tools/verify",
    ),
    ("trainer/checkpoint", "trainer/inference", "trainer/monitoring", "trainer/vllm_plugin", "tools/fetch"),
    ("trainer/standalone", "trainer/weights", "tools/fetch/archives", "tools/fetch/http"),
    ("trainer/distributed", "trainer/model", "tools/common", "tools/fetch/base"),
    ("pipeline/adapters", "pipeline/evaluation", "pipeline/upload"),
    ("pipeline/loading",),
    ("pipeline/planning",),
    ("pipeline/tokenization",),
    ("pipeline/shards",),
    ("pipeline/annotations", "pipeline/html", "pipeline/media", "pipeline/storage"),
    ("pipeline/media/decoders", "pipeline/storage/buckets"),
    ("pipeline/media/video",),
    ("pipeline/config",),
    ("pipeline/utils",),
)
#: modules that the sub-rooms of their own room use
BELOW_ITS_ROOM = {"tools/fetch/base.py": "tools/fetch/base"} | {
    f"pipeline/media/{name}.py": "pipeline/media/video"
    for name in ("errors", "file_kinds", "pixels", "video", "video_stream")
}
LARGEST_ROOM = 16  #: modules
LONGEST_MODULE = 400  #: lines
LONGEST_TEST_NAME = 60  #: characters, without ``test_``
#: public names that several modules define with one meaning: entry points of commands, and of peers in benchmarks
SHARED_NAMES = {"decode_frames", "main", "open_samples", "write_samples"}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def room_of(path: Path) -> str:
    """The room of a module: its folder, or the package for modules at its top."""
    relative = path.relative_to(ROOT).as_posix()
    return BELOW_ITS_ROOM.get(relative, relative.rpartition("/")[0])


def imported_rooms(path: Path) -> Iterator[tuple[str, str]]:
    """(room, dotted name) of every import of the project's own modules in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top in PACKAGES:
                yield "", name
            if top != "framestream" or not rest:
                continue
            target = ROOT / rest.replace(".", "/")
            module = next(
                (found for found in (target, target.parent) if found.is_dir() or found.with_suffix(".py").is_file()),
                None,
            )
            if module is not None and module.relative_to(ROOT).parts[0] in PACKAGES:
                file = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
                yield room_of(file), name


def test_every_room_is_in_the_layers():
    rooms = {room_of(path) for package in PACKAGES for path in sources(package) if path.name != "__init__.py"}
    assert rooms == {room for layer in LAYERS for room in layer}


@pytest.mark.parametrize("package", PACKAGES)
def test_rooms_import_only_what_is_below(package):
    level = {room: number for number, layer in enumerate(LAYERS) for room in layer}
    arrows = []
    for path in sources(package):
        room = room_of(path)
        for target, name in imported_rooms(path):
            assert target, f"{path}: import {name} as framestream.{name}"
            same = target == room or target not in level
            if not same and level[target] <= level.get(room, -1):
                arrows.append(f"{path.relative_to(ROOT)} imports {name}")
            other = {"tools": "trainer", "trainer": "tools"}.get(package)
            if other and target.split("/")[0] == other:
                arrows.append(f"{path.relative_to(ROOT)} imports {name}, of the other package")
    assert not arrows


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_rooms_and_modules_can_be_read_in_one_sitting(package):
    for folder in {path.parent for path in sources(package)}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= LARGEST_ROOM, f"{folder} has {len(modules)} modules"
    for path in sources(package):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= LONGEST_MODULE, f"{path} has {lines} lines"


def test_a_public_name_is_defined_once():
    """One name, one meaning, in the packages and the benchmarks together."""
    places = defaultdict(list)
    for package in ("framestream", *PACKAGES, "benchmarks"):
        files = sorted((ROOT / package).glob("*.py")) if package == "framestream" else sources(package)
        for path in files:
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    places[node.name].append(path.relative_to(ROOT).as_posix())
    twice = {name: found for name, found in places.items() if len(found) > 1 and not name.startswith("_")}
    assert not {name: found for name, found in twice.items() if name not in SHARED_NAMES}


def test_tests_stand_alone_and_have_short_names():
    long, linked = [], []
    for path in sources("tests"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                if len(node.name) - len("test_") > LONGEST_TEST_NAME:
                    long.append(f"{path.relative_to(ROOT)}: {node.name}")
            elif isinstance(node, ast.ImportFrom) and "test_" in (node.module or ""):
                linked.append(f"{path.relative_to(ROOT)} imports {node.module}")
    assert not long and not linked


def test_no_public_name_is_a_module_beside_it():
    """Importing such a module would put it in place of the function that a lazy package exports."""
    for path in sorted((ROOT / name for name in PACKAGES), key=str):
        for package in path.rglob("__init__.py"):
            homes = re.findall(r'^    "(\w+)": "framestream\.', package.read_text(encoding="utf-8"), re.M)
            assert not [name for name in homes if (package.parent / f"{name}.py").exists()], package
