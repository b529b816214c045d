"""Run one of the trainer's commands on the stand-in device: ``trainer``, ``trainer.chat``, ``trainer.evaluate``, ..."""

from __future__ import annotations

import runpy
import sys

from tests.helpers.emulator import install


def main() -> None:
    """Run the module named first with the other arguments."""
    install()
    name = sys.argv.pop(1)
    runpy.run_module(f"framestream.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
