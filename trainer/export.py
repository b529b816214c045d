"""``python -m trainer.export --checkpoint C --out DIR``: export weights in the layout of the published checkpoints.

C is a run's folder, its ``final`` folder, or one of its checkpoints (RUN/checkpoints/step-000500, of any number of
ranks). :mod:`framestream.trainer.checkpoint.export` lists the files that are written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from framestream.pipeline.utils.command_line import CommandParser, path_option, run_safely


@run_safely("stopped; nothing was written", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer.export") -> int:
    """Run the command line; returns the exit status: 0 done, 1 weights that cannot be read, 2 bad input."""
    description = "Export the weights of a run in the layout of the published checkpoints."
    parser = CommandParser(prog=prog, description=description)
    parser.add_argument(
        "--checkpoint", type=path_option, required=True, help="RUN, RUN/final or RUN/checkpoints/step-N"
    )
    parser.add_argument("--out", type=path_option, required=True, help="folder to create")
    parser.add_argument(
        "--release-files", type=path_option, metavar="DIR", help="copy the release's python files from here"
    )
    options = parser.parse_args(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
