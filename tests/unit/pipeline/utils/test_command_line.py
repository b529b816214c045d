"""Commands that end with one line, whatever happens to their output, and options that are checked."""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys

import pytest

from framestream.pipeline.utils.command_line import (
    CommandParser,
    integer_option,
    name_option,
    number_option,
    path_option,
    run_safely,
)
from tests.helpers.paths import ROOT

SCRIPT = """
import sys
from framestream.pipeline.utils.command_line import run_safely

@run_safely("stopped here")
def main(kind):
    if kind == "lines":
        for number in range(100_000):
            print(number)
    elif kind == "characters":
        print("\\u4f60 \\u00e9", file=sys.stderr)
    elif kind == "interrupt":
        raise KeyboardInterrupt
    elif kind == "file":
        open("/no/such/file")
    elif kind == "memory":
        bytearray(1 << 62)
    return 0

sys.exit(main(sys.argv[1]))
"""


def run(kind, **options):
    defaults = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", SCRIPT, kind], **defaults | options)


@pytest.mark.parametrize(
    ("kind", "status", "line"),
    [
        ("interrupt", 130, "stopped here\n"),
        ("file", 1, "error: /no/such/file: No such file or directory\n"),
        ("memory", 1, "error: not enough memory (out of memory); use a machine with more\n"),
    ],
)
def test_failures_are_one_line(kind, status, line):
    process = run(kind)
    assert (process.communicate()[1], process.returncode) == (line, status)


def test_output_that_nobody_reads_ends_quietly():
    process = run("lines", stdout=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
    process.stderr.close()


def test_output_to_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        process = run("lines", stdout=full)
        assert process.communicate()[1] == "error: No space left on device\n"
    assert process.returncode == 1


def test_characters_that_an_encoding_lacks_are_escaped():
    environment = {"PYTHONIOENCODING": "latin-1", "PYTHONPATH": ":".join(sys.path)}
    process = run("characters", env=environment, encoding="latin-1")
    assert process.communicate()[1] == "\\u4f60 é\n"
    assert process.returncode == 0


def test_an_exit_of_the_parser_stays():
    @run_safely()
    def main():
        raise SystemExit(2)

    with pytest.raises(SystemExit, match="2"):
        main()


def parser():
    made = CommandParser(prog="p", description="d")
    made.add_argument("--frames", type=integer_option(1, 8))
    made.add_argument("--heat", type=number_option(0, 2))
    made.add_argument("--share", type=number_option(0, 1, above=True))
    made.add_argument("--text", required=True)
    return made


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--frame", "4"], "unknown option --frame; did you mean --frames?"),
        (["--tex=4"], "unknown option --tex; did you mean --text?"),
        (["--zzzz"], "unknown option --zzzz; known: --frames, --heat, --share, --text"),
        (["--seat"], "unknown option --seat; did you mean --heat?"),
        (["--checkpoint", "RUN"], "unknown option --checkpoint; known: --frames"),
        *(
            (["--text=a", f"--frames={n}"], "a whole number from 1 to 8")
            for n in ("0", "-1", "9", "x", "1.5", "1" * 5000)
        ),
        *((["--text=a", f"--heat={n}"], "a number from 0 to 2") for n in ("nan", "inf", "-1", "2.1", "", "x")),
        *((["--text=a", f"--share={n}"], "a number above 0, at most 1") for n in ("0", "1.01", "-inf")),
    ],
)
def test_wrong_options_are_named(arguments, expected, capsys):
    with pytest.raises(SystemExit, match="2"):
        parser().parse_args(arguments)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and expected in said


def test_an_argument_that_needs_no_option_is_said(capsys):
    made = CommandParser(prog="serve", description="d")
    made.add_argument("checkpoint")
    made.add_argument("--fetch-seconds")
    for arguments in (["--checkpoint", "RUN"], ["--checkpoint=RUN"]):
        with pytest.raises(SystemExit, match="2"):
            made.parse_args(arguments)
        fix = "unknown option --checkpoint; name the checkpoint without an option: serve CHECKPOINT;"
        assert capsys.readouterr().err.startswith(f"error: {fix}")


def test_many_options_are_left_to_the_help(capsys):
    made = CommandParser(prog="serve", description="d")
    for number in range(20):
        made.add_argument(f"--option-{number}")
    with pytest.raises(SystemExit, match="2"):
        made.parse_args(["--zzzz"])
    assert capsys.readouterr().err == "error: unknown option --zzzz; serve --help lists the options\n"


def test_right_options_are_read():
    options = parser().parse_args(["--text", "-- what is --this", "--frames", "8", "--heat", "0", "--share", "1"])
    assert vars(options) == {"text": "-- what is --this", "frames": 8, "heat": 0.0, "share": 1.0}


#: options that are neither numbers nor paths
TEXTS = {"--set", "--question", "--address", "--local_rank"}
OWN_KINDS = ("word_option", "_frames_option", "_hops_option")  #: types of one command, tested with it


def option_calls():
    """(file, name, keywords) of every option of every command."""
    folders = ("trainer", "trainer/evaluation", "tools")
    for path in sorted(path for folder in folders for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                yield path.name, ast.literal_eval(node.args[0]), keywords


def test_every_option_of_every_command_is_checked():
    """Numbers have bounds, and paths expand; an option of bare text or of a kind of its own is named here."""
    kinds = ("integer_option(", "number_option(", "path_option", "name_option", *OWN_KINDS)
    found = list(option_calls())
    assert len(found) > 40
    assert not [
        (file, name)
        for file, name, keywords in found
        if name not in TEXTS
        and "choices" not in keywords
        and keywords.get("action") != "'store_true'"
        and not keywords.get("type", "").startswith(kinds)
    ]


def test_paths_and_names_expand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("FS_A", "/a")
    assert str(path_option("~/x")) == name_option("~/x") == "/home/me/x"
    assert str(path_option("$FS_A/x")) == name_option("${FS_A}/x") == "/a/x"
    assert name_option("https://host/~$FS_A") == "https://host/~$FS_A"
    for text in ("https://host/x", "$FS_NONE/x", "", " ", "a\0b"):
        with pytest.raises(argparse.ArgumentTypeError):
            path_option(text)


def test_no_command_needs_docstrings():
    """Under python -OO docstrings are missing; where one is used, it has a default."""
    for path in (path for package in ("pipeline", "trainer", "tools") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = isinstance(node, ast.Attribute) and getattr(node.value, "id", getattr(node.value, "attr", ""))
            assert used != "__doc__", f"{path}: write (__doc__ or '')"


@pytest.mark.parametrize("command", ["", ".chat", ".evaluate", ".haystack", ".export"])
def test_commands_that_need_docstrings_say_so(command):
    done = subprocess.run(
        [sys.executable, "-OO", "-m", f"framestream.trainer{command}", "--help"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: python -OO removes docstrings, which transformers needs; run without -OO\n"
