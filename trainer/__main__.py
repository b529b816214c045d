"""``python -m trainer --manifest M`` trains one stage. With ``--dry-run`` it describes the run instead.

Under torchrun, deepspeed or Slurm each process runs this same command. Repeating it resumes from the last checkpoint.
A finished stage is not trained again.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from types import FrameType
from typing import TYPE_CHECKING

from framestream.pipeline.utils.command_line import CommandParser, name_option, run_safely
from framestream.pipeline.utils.interrupts import signal_handlers
from framestream.trainer.distributed.launchers import (
    EXIT_PREEMPTED,
    PREEMPTION_SIGNALS,
    RESUME_HINT,
    allocator_settings,
    describe_old_torch,
    describe_runtime_error,
    process_rank,
)

if TYPE_CHECKING:
    from framestream.pipeline.config.manifest import Manifest


@run_safely(f"stopped; {RESUME_HINT}", docstrings=True)
def main(arguments: Sequence[str] | None = None, prog: str = "python -m trainer") -> int:
    """Run the command line; return its exit status.

    The status is 0 for success, 1 for a run that cannot continue, 2 for bad input, 75 for a run stopped by SIGTERM or
    SIGUSR1, and 130 for one stopped by Ctrl-C.
    """
    parser = CommandParser(prog=prog, description="Train one stage, or describe its run with --dry-run.")
    parser.add_argument(
        "--manifest", type=name_option, required=True, help="the stage's YAML, such as manifests/stage3.yaml"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="override a manifest field")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved manifest and its costs, then stop")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    options = parser.parse_args(arguments)
    torch_version = version("torch")
    if fault := describe_old_torch(torch_version):
        return _failed(fault, 2)
    os.environ.update(allocator_settings(os.environ, torch_version))  # before torch is imported
    from framestream.pipeline.config.manifest import ManifestError, load_manifest
    from framestream.pipeline.shards.index import ShardsError

    try:
        manifest = load_manifest(options.manifest, options.set)
        if options.dry_run:
            if _is_main():
                from framestream.trainer.training.dry_run import describe

                print(describe(manifest))
            return 0
        with signal_handlers(dict.fromkeys(PREEMPTION_SIGNALS, _exit_preempted)):  # until the run has its own
            return _train(manifest)
    except (ManifestError, ShardsError) as error:
        return _failed(error, 2)


def _train(manifest: Manifest) -> int:
    from framestream.pipeline.loading.loader import LoaderError
    from framestream.trainer.checkpoint.save import WriteError
    from framestream.trainer.checkpoint.state import CheckpointError
    from framestream.trainer.distributed.call_order import CallOrderError
    from framestream.trainer.distributed.launchers import LaunchError
    from framestream.trainer.distributed.preemption import Preempted
    from framestream.trainer.distributed.run_store import MainRankError
    from framestream.trainer.monitoring.log_setup import setup_logging
    from framestream.trainer.training.loop import TrainingError, train
    from framestream.trainer.training.memory_plan import DeviceMemoryError
    from framestream.trainer.weights.tensor_files import WeightsError

    setup_logging(process_rank(os.environ))
    try:
        final = train(manifest)
    except Preempted as preempted:
        if _is_main() or not preempted.everywhere:
            print(f"stopped by {preempted}; {RESUME_HINT}", file=sys.stderr)
        return EXIT_PREEMPTED
    except WriteError as error:
        return _failed(error, 1, all_ranks=False)
    except LaunchError as error:
        for fault in error.faults:
            _failed(fault, 2, error.everywhere)
        return 2
    except (CallOrderError, CheckpointError, MainRankError, TrainingError, WeightsError) as error:
        return _failed(error, 1)
    except (DeviceMemoryError, LoaderError) as error:
        return _failed(error, 1, all_ranks=False)
    except RuntimeError as error:
        if reason := describe_runtime_error(error, os.environ):
            return _failed(reason, 1, all_ranks=False)
        raise
    if _is_main():
        print(f"{manifest.name}: final weights are in {final}")
    return 0


def _is_main() -> bool:
    return process_rank(os.environ) == 0


def _exit_preempted(number: int, frame: FrameType | None) -> None:
    """Exit at a signal that arrives before training starts."""
    if _is_main():
        print(f"stopped by {signal.Signals(number).name}; run the same command to start again", file=sys.stderr)
    raise SystemExit(EXIT_PREEMPTED)


def _failed(error: Exception | str, status: int, all_ranks: bool = True) -> int:
    """Print the error and return ``status``. Only rank 0 prints an error that all ranks have."""
    if not all_ranks or _is_main():
        print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
