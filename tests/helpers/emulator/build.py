"""Compile the device once for each environment, and keep it in the user's cache."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
FLAGS = ("-std=c++20", "-O0", "-fPIC", "-shared", "-w", "-DAT_PER_OPERATOR_HEADERS")
COMPILERS = ("g++", "c++", "clang++")


def unavailable() -> str:
    """Return why the device cannot be used here, as the reason of a skip; empty if it can."""
    if torch.cuda.is_available():
        return "a GPU is here"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
        return "the stand-in device needs torch 2.9"
    if _compiler() is None:
        return f"the stand-in device needs a compiler: {', '.join(COMPILERS)}"
    return ""


def build_library() -> Path:
    """Return the compiled device. Only the first process of an environment compiles it, and others wait."""
    compiler = _compiler()
    assert compiler is not None, unavailable()
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    made_of = [SOURCE.read_text(), torch.__version__, torch.__file__, version, *FLAGS]
    digest = hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "framestream-tests"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"emu-{digest}.so"
    with open(folder / f"emu-{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            part = library.with_suffix(f".part{os.getpid()}")
            done = subprocess.run(_command(compiler, part), capture_output=True, text=True)
            assert done.returncode == 0, f"{SOURCE.name} does not compile\n{done.stderr[:4000]}"
            os.replace(part, library)
    return library


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def _command(compiler: str, output: Path) -> list[str]:
    package = Path(torch.__file__).parent
    include = [f"-I{package / 'include'}", f"-I{package / 'include/torch/csrc/api/include'}"]
    link = [f"-L{package / 'lib'}", "-ltorch_cpu", "-lc10"]
    return [compiler, *FLAGS, *include, str(SOURCE), "-o", str(output), *link]
