"""Run a module on the stand-in device: one of the trainer's commands, such as ``trainer.chat``, or a test's worker."""

from __future__ import annotations

import runpy
import sys

from tests.helpers.emulator import install


def main() -> None:
    """Run the module named first with the other arguments."""
    install()
    name = sys.argv.pop(1)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
