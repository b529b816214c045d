"""``python -m trainer.export --checkpoint C --out DIR``: export weights in the layout of the published checkpoints.

C is a run's folder, its ``final`` folder, or one of its checkpoints (RUN/checkpoints/step-000500, of any number of
ranks). :mod:`framestream.trainer.checkpoint.export` lists the files that are written. ``--push OWNER/NAME`` uploads
them to the hub, and without ``--checkpoint`` an export that is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from framestream.pipeline.utils.command_line import CommandParser, name_option, path_option, run_safely


@run_safely("stopped", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.export") -> int:
    """Run the command line; returns the exit status: 0 done, 1 unreadable weights or a failed upload, 2 bad input."""
    description = "Export the weights of a run in the layout of the published checkpoints."
    parser = CommandParser(prog=prog, description=description)
    parser.add_argument(
        "--checkpoint", type=path_option, help="RUN, RUN/final or RUN/checkpoints/step-N; not needed to push an export"
    )
    parser.add_argument("--out", type=path_option, required=True, help="folder to create, or an export to push")
    parser.add_argument(
        "--release-files", type=path_option, metavar="DIR", help="copy the release's python files from here"
    )
    parser.add_argument(
        "--push", type=name_option, metavar="OWNER/NAME", help="upload the export to this model of the hub"
    )
    parser.add_argument("--private", action="store_true", help="create the model on the hub as private")
    options = parser.parse_args(arguments)
    if not options.checkpoint and not options.push:
        parser.error("name --checkpoint, or an export with --out and --push")
    if options.checkpoint and (status := _export(options)):
        return status
    return _push(options) if options.push else 0


def _export(options: argparse.Namespace) -> int:
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.trainer.checkpoint.export import ExportError, export
    from framestream.trainer.weights.hf_config import describe_tower_mismatch
    from framestream.trainer.weights.tensor_files import WeightsError

    try:
        settings = export(options.checkpoint, options.out, options.release_files)
    except (ExportError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.checkpoint}: exported to {options.out}")
    if difference := describe_tower_mismatch(settings):
        print(f"note: the release's own code builds another tower ({difference}); only framestream reads this one")
    return 0


def _push(options: argparse.Namespace) -> int:
    from framestream.pipeline.upload.files import RefusedError, UploadError
    from framestream.trainer.checkpoint.push import push_model

    try:
        result = push_model(options.out, options.push, True if options.private else None)
    except RefusedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UploadError, OSError) as error:
        again = " without --checkpoint" if options.checkpoint else ""
        print(f"error: {error}{again}", file=sys.stderr)
        return 1
    counts = f"{result.files:,} files, compared by size and digest; {result.sent:,} were sent now"
    print(f"hf://models/{options.push}: has {options.out}, {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
