"""The project around the code: what its README, documents, licence and dependencies say is what is there."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from framestream.pipeline.annotations.normalize import AnnotationError, normalize
from framestream.pipeline.annotations.reader import read_annotations
from framestream.pipeline.config.data import EntryConfig
from framestream.pipeline.config.manifest import Manifest, load_manifest
from framestream.pipeline.config.preprocessing import SAMPLERS
from framestream.pipeline.config.schema import show_bound
from framestream.pipeline.shards.index import FILES
from framestream.pipeline.shards.ledger import REASONS, SCHEMA
from framestream.pipeline.shards.samples import dialogue_metadata, media_metadata
from framestream.tools.fetch.registry import SOURCE_FORMS
from tests.helpers.paths import ROOT

PACKAGES = ("pipeline", "trainer", "tools")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# README and documents -------------------------------------------------------------------------------------------------


def tree(text: str) -> tuple[dict[str, str], dict[str, str]]:
    """Files and folders of a tree (a fenced block that opens with ```tree), each with what is said about it."""
    block = re.search(r"^```tree\n(.*?)^```$", text, re.S | re.M)
    assert block, "there is no tree"
    files, folders, parents = {}, {}, []
    for line in block[1].splitlines():
        name, _, words = line.strip().partition(" ")
        depth = (len(line) - len(line.lstrip())) // 2
        del parents[depth:]
        path = "".join(parents) + name
        assert path not in files | folders, f"{path} stands twice"
        if name.endswith("/"):
            parents.append(name)
            folders[path] = words.strip()
        else:
            files[path] = words.strip()
    return files, folders


def test_the_tree_names_every_file_and_folder_once_and_no_other():
    files, folders = tree((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
    kinds = [("*.py", ("pipeline", "trainer", "tools", "benchmarks", "framestream", "docs")), ("*.md", ("docs",))]
    kinds += [("*.j2", ("pipeline", "trainer", "tools")), ("*.yaml", ("manifests",)), ("*.sbatch", ("manifests",))]
    found = {relative(path) for kind, tops in kinds for top in tops for path in walk(ROOT / top, kind)}
    assert set(files) == {path for path in found if not path.endswith("__init__.py")}
    assert set(folders) == {f"{parent}/" for path in found for parent in list(Path(path).parents)[:-1]}
    assert all((files | folders).values()), "a line of the tree has no words"


def walk(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder that match, without those below links."""
    return [path for path in folder.rglob(pattern) if not any(parent.is_symlink() for parent in path.parents)]


def test_the_architecture_page_has_the_layers():
    module = ast.parse((ROOT / "tests" / "docs" / "test_structure.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(node.targets[0]): node.value for node in module.body if isinstance(node, ast.Assign)}
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| (`\w.*) \|$", page[page.index("| layer | rooms |") :], re.M)
    assert [tuple(re.findall(r"`([^`]+)`", row)) for row in rows] == list(ast.literal_eval(assigned["LAYERS"]))


def anchors(text: str) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=relative)
def test_documents_name_only_what_exists(path):
    text = path.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", MAKEFILE, re.M))
    assert set(re.findall(r"`?\bmake ([a-z]+)`|^ {4}make ([a-z]+)\b", text, re.M)) <= {
        pair for target in targets for pair in ((target, ""), ("", target))
    }
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (path.parent / link).exists(), f"{link} is not there"
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", text):
        target = path.parent / link if link else path
        assert anchor in anchors(target.read_text(encoding="utf-8")), f"{link}#{anchor} is not there"
    for name in re.findall(r"python (?:-m )?((?:pipeline|trainer|tools)[\w./]*)", text):
        candidates = [ROOT / name] if name.endswith(".py") else [ROOT / (name.replace(".", "/") + ".py")]
        candidates.append(ROOT / name.replace(".", "/") / "__main__.py")
        assert any(candidate.is_file() for candidate in candidates), f"{name} cannot be run"
    for name in re.findall(r"\b((?:pipeline|trainer|tools|manifests|tests|docs)/[\w./]+\.(?:py|yaml|md))", text):
        assert (ROOT / name).is_file(), f"{name} is not there"


def test_the_two_commands_of_the_readme_are_targets():
    commands = re.findall(r"^ {4}(make \w+)", README, re.M)
    assert commands[:2] == ["make demo", "make test"]


def fields(cls: type, path: str = "") -> Iterator[tuple[str, dataclasses.Field, str]]:
    """(dotted name, field, type in words) of every field that a manifest can hold."""
    words = {"str": "text", "int": "integer", "float": "number", "bool": "true/false"}
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        many = typing.get_origin(hint) is tuple
        inner = next((part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if inner:
            yield from fields(inner, f"{path}{field.name}{'[]' if many else ''}.")
        else:
            first = next(iter(typing.get_args(hint)), hint)
            yield f"{path}{field.name}", field, words[first.__name__]


def manual_cells(name: str, field: dataclasses.Field, kind: str) -> str:
    """The first three cells of a field's row in docs/manifest.md."""
    choices, low, high = (field.metadata.get(key) for key in ("choices", "low", "high"))
    bounds = kind if low is None else f"{kind}, {show_bound(low)} to {show_bound(high)}"
    allowed = ", ".join(f"`{choice}`" for choice in choices or ()) or bounds
    default = field.default
    if isinstance(default, bool):
        shown = f"`{str(default).lower()}`"
    else:
        shown = "required" if default is dataclasses.MISSING else "none" if default is None else f"`{default}`"
    shown = "empty" if shown == "``" else shown
    return f"| `{name}` | {allowed} | {shown} |"


def test_manifest_fields_are_documented_with_values_and_default():
    lines = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if re.match(r"\| `[a-z0-9_.\[\]]+` \|", line)]
    wanted = [manual_cells(*field) for field in fields(Manifest)]
    missing = [cells for cells in wanted if not any(row.startswith(cells + " ") for row in rows)]
    assert not missing, "add to docs/manifest.md:\n" + "\n".join(missing)
    assert len(rows) == len(wanted), "docs/manifest.md describes a field that does not exist"
    assert all(len(row.split(" | ")) == 4 and len(row.split(" | ")[3]) > 5 for row in rows), "say what it means"


def test_every_sampler_is_documented():
    page = (ROOT / "docs" / "manifest.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if line.startswith("| `frames.sampler` |"))
    assert [name for name in SAMPLERS if f"`{name}`" not in row] == [], "add it to frames.sampler in docs/manifest.md"


def test_every_kind_of_location_is_in_the_example_root_map():
    example = (ROOT / "manifests" / "roots.example.yaml").read_text(encoding="utf-8")
    kinds = re.findall(r"\b([a-z][a-z0-9]*):(?!//HOST)", SOURCE_FORMS)
    assert {"dir", "hf"} <= set(kinds) and not [kind for kind in kinds if f"{kind}:" not in example]


def test_every_column_of_the_step_log_is_documented():
    """Keys of the dictionaries that StepStats and the training loop put into log.jsonl."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    tree = ast.parse((ROOT / "trainer" / "monitoring" / "step_stats.py").read_text(encoding="utf-8"))
    stats = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "StepStats")
    to_dict = next(node for node in stats.body if isinstance(node, ast.FunctionDef) and node.name == "to_dict")
    keys = [key.value for node in ast.walk(to_dict) if isinstance(node, ast.Dict) for key in node.keys]
    assert len(keys) > 10 and not [key for key in keys if f"`{key}`" not in page], "add them to docs/training.md"


def test_every_manifest_field_is_read_somewhere():
    """A field that nothing reads would be a switch without a wire."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in SOURCES)
    for name, _, _ in fields(Manifest):
        leaf = name.rpartition(".")[2]
        assert re.search(rf"\.{leaf}\b(?! ?[:(]| ?=[^=])", text), f"{name} is read nowhere"


def test_the_format_page_names_every_field_column_and_reason():
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    named = {word for cell in re.findall(r"^\| (`[^|]+`) \|", text, re.M) for word in re.findall(r"`([^`]+)`", cell)}
    nothing = {name: 0 for name in ("start", "width", "height", "source_width", "source_height", "vlen", "fps")}
    lists = {name: [] for name in ("sample", "frame_index", "timestamps")}
    media = media_metadata(key="", kind="", source="", duration=0, salvaged=False, sha256="", **nothing, **lists)
    dialogue = dialogue_metadata(key="", id="", entry="", split="", media=[], conversations=[], meta={})
    columns = {name for schema in (*FILES.values(), SCHEMA) for name in schema.names}
    wanted = columns | json.loads(media).keys() | json.loads(dialogue).keys() | REASONS.keys()
    assert wanted <= named, f"docs/format.md lacks {sorted(wanted - named)}"
    reasons = re.search(r"\| reason \| meaning \|\n\| --- \| --- \|\n((?:\|.*\n)+)", text)[1]
    assert re.findall(r"^\| `(\w+)`", reasons, re.M) == list(REASONS)


def fenced(path: Path, language: str) -> str:
    """The only fenced block of a language in a document."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(encoding="utf-8"), re.S | re.M)
    assert len(blocks) == 1, f"{relative(path)}: {len(blocks)} blocks of {language}"
    return blocks[0]


def test_the_readmes_manifest_loads(tmp_path):
    text = fenced(ROOT / "README.md", "yaml").replace("extends: ", f"extends: {ROOT}/")
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    manifest = load_manifest(tmp_path / "mine.yaml")
    assert [entry.split for entry in manifest.data.entries] == ["train", "val"]
    used = re.findall(r"--stage (\d) --manifest mine\.yaml", README)
    assert used and set(used) == {str(manifest.stage)}


def test_the_annotation_examples_are_read_as_described(tmp_path):
    (tmp_path / "a.jsonl").write_text(fenced(ROOT / "docs" / "annotations.md", "jsonl"), encoding="utf-8")
    whole, clip, pair = read_annotations(tmp_path / "a.jsonl", EntryConfig(annotation="a.jsonl", root="r"))
    assert (whole.id, [(m.path, m.start, m.end) for m in whole.media]) == ("a1", [("a.mp4", None, None)])
    assert [(m.path, m.start, m.end) for m in clip.media] == [("a.mp4", 2, 5.5)]
    assert (clip.id, clip.meta, clip.turns[0]) == (
        "1",
        {"family": "colour"},
        {"from": "human", "value": "<image>\nWhich colour?"},
    )
    assert [(m.kind, m.path) for m in pair.media] == [("image", "b.jpg"), ("image", "c.jpg")]


def test_names_that_the_annotation_page_calls_unread_are_unread():
    entry, mark = EntryConfig(annotation="a.jsonl", root="r", media_type="video"), "<image>\n"
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}]
    marked = [{"from": "human", "value": f"{mark}What?"}, turns[1]]
    with pytest.raises(AnnotationError) as error:
        normalize({"messages": turns, "video": "a.mp4"}, entry, 0)
    assert error.value.reason == "no_conversations"
    for conversation in (turns, marked):
        for name in ("images", "videos"):
            with pytest.raises(AnnotationError) as error:
                normalize({"conversations": conversation, name: ["a.mp4"]}, entry, 0)
            assert error.value.reason == "bad_media"
