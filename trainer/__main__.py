"""``python -m trainer --manifest M``: train one stage, or say with ``--dry-run`` what it would be.

Under torchrun, deepspeed or Slurm each process runs this same command. Repeating it continues from the last
checkpoint; a finished stage is left alone.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from framestream.pipeline.config.manifest import ManifestError, load_manifest
from framestream.pipeline.shards.index import ShardsError
from framestream.trainer.distributed.launchers import EXIT_PREEMPTED, PREEMPTION_SIGNALS


def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer") -> int:
    """Command line; returns the exit status (0 done, 1 a run that cannot go on, 2 bad input, 75 left when asked by
    SIGTERM or SIGUSR1, 130 stopped by Ctrl-C)."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0])
    parser.add_argument("--manifest", required=True, help="the stage's YAML, such as manifests/stage3.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved manifest and its costs, then stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    options = parser.parse_args(arguments)
    try:
        manifest = load_manifest(options.manifest, options.set)
        if options.dry_run:
            from framestream.trainer.training.dry_run import describe

            print(describe(manifest))
            return 0
        for number in PREEMPTION_SIGNALS:  # until the run takes them over
            signal.signal(number, _leave)
        return _train(manifest)
    except (ManifestError, ShardsError) as error:
        return _failed(error, 2)
    except KeyboardInterrupt:
        print(
            "stopped; the same command goes on from the last checkpoint, or begins anew where there is none",
            file=sys.stderr,
        )
        return 130


def _train(manifest) -> int:
    from framestream.pipeline.loading.loader import LoaderError
    from framestream.trainer.checkpoint.save import CheckpointError, WriteError
    from framestream.trainer.distributed.call_order import CallOrderError
    from framestream.trainer.distributed.launchers import LaunchError
    from framestream.trainer.distributed.preemption import Preempted
    from framestream.trainer.training.loop import TrainingError, train
    from framestream.trainer.weights.tensor_files import WeightsError

    try:
        train(manifest)
    except Preempted as asked:
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by {asked}; the same command goes on from the last checkpoint", file=sys.stderr)
        return EXIT_PREEMPTED
    except WriteError as error:
        return _failed(error, 1, all_ranks=False)
    except LaunchError as error:
        for fault in error.faults:
            _failed(fault, 2, error.everywhere)
        return 2
    except (CallOrderError, CheckpointError, TrainingError, WeightsError) as error:
        return _failed(error, 1)
    except LoaderError as error:
        return _failed(error, 1, all_ranks=False)
    return 0


def _leave(number: int, frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"stopped by {signal.Signals(number).name}; the same command starts again", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)


def _failed(error: Exception | str, status: int, all_ranks: bool = True) -> int:
    """Say what went wrong, once where all ranks see the same."""
    if not all_ranks or os.environ.get("RANK", "0") == "0":
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
