"""Run the same training in many ways and compare losses, gradient norms and weights with the first.

    python -m benchmarks.training.equivalence [--steps 10] [--share 0.004]

The training is stage 2 of the demo in float32 on ``--share`` of its data, through ``python -m trainer``. Runs differ in
packing, micro-steps, ranks, ZeRO stages, offload and recomputation (``tests/helpers/model/training_ways.py``). Every
run must have the same global batches as the first. Exits with 1 if a difference exceeds the printed tolerances.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tests.helpers.corpora import training_corpus as corpus
from tests.helpers.model import training_ways


def main() -> int:
    """Run every variant and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--share", type=float, default=0.004, help="of the demo's data")
    options = parser.parse_args()
    tolerances, failed = training_ways.TOLERANCES, False
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        training_ways.prepare(folder, options.share)
        print("| | losses | gradient norms | what training added to the weights |\n| --- | --- | --- | --- |")
        for number, (name, variant) in enumerate(training_ways.WAYS.items()):
            corpus.run(*training_ways.command(f"way{number}", variant, f"train.max_steps={options.steps}"), cwd=folder)
            if number:
                difference = training_ways.apart(folder / f"way{number}", folder / "way0")
                failed |= any(difference[field] > tolerance for field, tolerance in tolerances.items())
                print(f"| {name} | {' | '.join(f'{difference[field]:.1e}' for field in tolerances)} |", flush=True)
    print(f"| tolerance | {' | '.join(f'{tolerance:.0e}' for tolerance in tolerances.values())} |")
    print(f"compared with: {next(iter(training_ways.WAYS))}; {options.steps} steps")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
