"""``python -m trainer.export --checkpoint C --out DIR``: export weights in the layout of the published checkpoints.

C is a run's folder, its ``final`` folder, or one of its checkpoints (RUN/checkpoints/step-000500, of any number of
ranks). :mod:`framestream.trainer.checkpoint.export` lists the files that are written. With ``--self-contained`` the
folder has code of its own for transformers, and C may be a published checkpoint, too. ``--push OWNER/NAME`` uploads the
files to the hub, and without ``--checkpoint`` an export that is there.
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
        "--checkpoint",
        type=path_option,
        help="RUN, RUN/final, or step-N, best or latest in RUN/checkpoints; not needed to push an export",
    )
    parser.add_argument("--out", type=path_option, required=True, help="folder to create, or an export to push")
    parser.add_argument(
        "--release-files", type=path_option, metavar="DIR", help="copy the release's python files from here"
    )
    parser.add_argument("--merge", action="store_true", help="merge the adapters of a run with LoRA into its weights")
    parser.add_argument(
        "--self-contained",
        action="store_true",
        help="add code and settings, so that transformers alone loads it; C may be a published checkpoint",
    )
    parser.add_argument(
        "--push", type=name_option, metavar="OWNER/NAME", help="upload the export to this model of the hub"
    )
    parser.add_argument("--private", action="store_true", help="create the model on the hub as private")
    options = parser.parse_args(arguments)
    if not options.checkpoint and not options.push:
        parser.error("name --checkpoint, or an export with --out and --push")
    if options.self_contained and options.release_files:
        parser.error("--release-files: not with --self-contained, which writes code of its own; leave one of them out")
    if options.self_contained and not options.checkpoint:
        parser.error("--self-contained: needs --checkpoint, from which the export is written")
    if options.merge and not options.checkpoint:
        parser.error("--merge needs the --checkpoint of a run with adapters")
    if options.checkpoint and (status := _export(options)):
        return status
    return _push(options) if options.push else 0


def _export(options: argparse.Namespace) -> int:
    from framestream.pipeline.config.manifest import ManifestError
    from framestream.trainer.checkpoint.export import ExportError, export
    from framestream.trainer.weights.hf_config import describe_tower_mismatch
    from framestream.trainer.weights.tensor_files import WeightsError

    try:
        options_of_export = {"self_contained": options.self_contained, "merge": options.merge}
        settings = export(options.checkpoint, options.out, options.release_files, **options_of_export)
    except (ExportError, ManifestError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WeightsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.checkpoint}: exported to {options.out}")
    if not options.self_contained and (difference := describe_tower_mismatch(settings)):
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
