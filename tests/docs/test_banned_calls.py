"""Calls that run or unpack what others wrote: the sources have none."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.paths import ROOT

SOURCES = sorted(path for name in ("pipeline", "trainer", "tools") for path in (ROOT / name).rglob("*.py"))

BANNED = {"os.system", "os.popen", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}


def banned(text: str) -> list[str]:
    """Calls in Python source ``text`` that the project never makes, as ``line: call``."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        bad = (
            name in BANNED
            or name in ("eval", "exec")
            or name.endswith((".extractall", ".extract"))
            or (name == "torch.load" and keywords.get("weights_only") != "True")
            or keywords.get("shell", "False") != "False"
            or keywords.get("allow_pickle", "False") != "False"
            or keywords.get("trust_remote_code", "False") != "False"
        )
        if bad:
            found.append(f"{node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_banned_calls(path):
    assert not banned(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "call",
    [
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "pickle.load(file)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "tar.extractall(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "eval(text)",
    ],
)
def test_banned_calls_are_seen(call):
    assert banned(f"if True:\n    x = {call}\n") == [f"2: {call.partition('(')[0]}"]


@pytest.mark.parametrize("call", ["torch.load(p, weights_only=True)", "model.eval()", "run(['a'], shell=False)"])
def test_allowed_calls_are_not(call):
    assert not banned(call)
