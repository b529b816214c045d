"""Damage every file that the project reads, and judge what its commands make of it.

    python -m benchmarks.fuzz [--seed 0] [--mutants 10000] [--target NAME ...] [--processes 2] [--only TARGET:NUMBER]

Each mutant is one file with random damage that its seed, target and number decide. It is read in a process of its own.
These outcomes are right:

    clean      an error that names the file, or the folder that it is in
    row        what is damaged is left out and recorded; everything else is unchanged
    same       the result of the undamaged file
    accepted   another result, of files that are the user's own words

The others are wrong: another result without a word, a message that names nothing, a traceback, a crash, a process that
runs for 20 seconds, and more than 2 GiB of memory. The exit status is then 1, and each is listed with the option that
repeats it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyarrow as pa  # noqa: E402 - needs the environment above
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.fuzz.campaign import (
    FuzzCampaign,
    FuzzError,
    append_outcome,
    fault_lines,
    read_outcomes,
    share_out,
    summary_table,
)  # noqa: E402
from benchmarks.fuzz.targets import TARGETS  # noqa: E402


def main() -> int:
    """Run the command. Returns the exit status: 0 all outcomes are right, 1 some are not, 2 the campaign cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of all damage")
    parser.add_argument("--mutants", type=int, default=10_000, help="number of mutants over all targets")
    parser.add_argument("--target", action="append", choices=[*TARGETS], help="damage only this one; repeatable")
    parser.add_argument("--processes", type=int, default=2, help="mutants that are read at the same time")
    parser.add_argument("--only", action="append", metavar="TARGET:NUMBER", help="repeat this mutant; repeatable")
    parser.add_argument("--folder", type=Path, help="where the files are written (default: a temporary folder)")
    parser.add_argument("--log", type=Path, help="append outcomes to this file; mutants that it has are not repeated")
    options = parser.parse_args()
    only = [name.rpartition(":") for name in options.only or ()]
    names = dict.fromkeys([name for name, _, _ in only] or options.target or TARGETS)
    targets = [TARGETS[name] for name in names]
    numbers = {name: [int(number) for other, _, number in only if other == name] for name in names}
    if not only:
        numbers = share_out(targets, options.mutants)
    known = read_outcomes(options.log) if options.log else []
    for outcome in known:
        numbers[outcome.target] = [number for number in numbers.get(outcome.target, ()) if number != outcome.number]
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    torch.set_num_threads(1)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=options.folder or memory) as folder:
        campaign = FuzzCampaign(Path(folder), options.seed, targets)
        try:
            sound = campaign.prepare()
        except FuzzError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        started, total = time.monotonic(), sum(map(len, numbers.values()))
        outcomes = list(known)
        for outcome in tqdm(campaign.run(sound, numbers, options.processes), total=total, unit=" mutants"):
            outcomes.append(outcome)
            if options.log:
                append_outcome(options.log, outcome)
    order = {name: number for number, name in enumerate(names)}
    outcomes.sort(key=lambda outcome: (order[outcome.target], outcome.number))
    if only:
        for outcome in outcomes:
            print(
                f"{outcome.target}:{outcome.number} {outcome.kind}: {outcome.file}: {outcome.damage}\n{outcome.detail}"
            )
    faults = fault_lines(outcomes)
    print(*faults, sep="\n")
    print(summary_table(outcomes))
    seconds = time.monotonic() - started
    print(f"seed {options.seed}: {len(outcomes):,} mutants ({total:,} in {seconds:,.0f} s), {len(faults)} not right")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
