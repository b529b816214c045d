"""The console command ``framestream``: one name for every command line of the project, from any folder.

    framestream build --stage 3 --dry-run
    framestream train --manifest manifests/stage3.yaml

A command is imported when it is chosen, so that ``--help`` and ``--version`` answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from framestream.pipeline.utils.command_line import nearest_name, run_safely

#: command -> (module with ``main(arguments, prog)``, what it does)
COMMANDS = {
    "build": ("framestream.tools.build_shards", "build the shards of a stage"),
    "verify": ("framestream.tools.verify_shards", "check a shard root against the format"),
    "push": ("framestream.tools.push_shards", "upload a shard root to the hub or to a bucket"),
    "inspect": ("framestream.tools.inspect_shards", "write an HTML page about a shard root"),
    "export-dataset": ("framestream.tools.export_dataset", "write shards as files for other trainers"),
    "demo-data": ("framestream.tools.demo_data", "generate the videos and questions of the demo"),
    "train": ("framestream.trainer.__main__", "train one stage"),
    "chat": ("framestream.trainer.chat", "ask a trained model about videos and images"),
    "serve": ("framestream.trainer.serve", "answer questions over HTTP, and show a page for it"),
    "evaluate": ("framestream.trainer.evaluate", "score held-out questions, with blind and shuffled controls"),
    "haystack": ("framestream.trainer.haystack", "score needles hidden in long videos"),
    "export": ("framestream.trainer.export", "write a run in the layout of the published checkpoints"),
    "report": ("framestream.trainer.report", "write runs and scores as one HTML page"),
}


def usage() -> str:
    """The help text: every command with one line about it."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    options = ["  --version", "  --help"]
    return "\n".join(["usage: framestream COMMAND [options]", "", *lines, "", *options, "", HINT])


HINT = "framestream COMMAND --help lists the options of a command."


@run_safely()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status, or 2 for a command that does not exist."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    if name == "--version":
        from framestream import __version__

        print(f"framestream {__version__}")
        return 0
    if name in ("", "-h", "--help"):
        print(usage())
        return 0 if name else 2
    if name not in COMMANDS:
        print(f"error: {name!r} is not a command{nearest_name(name, COMMANDS)}", file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[name][0])
    return module.main(arguments[1:], prog=f"framestream {name}")


if __name__ == "__main__":
    sys.exit(main())
