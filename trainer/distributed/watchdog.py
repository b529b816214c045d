"""Watchdog: ranks report progress to a key-value store. A stalled run is aborted with the name of the rank responsible.

Ranks meet in collective calls. A rank that is stopped, swaps or waits for a disk blocks all others without a message.
So each rank writes a *heartbeat* into the launcher's key-value store, at MASTER_ADDR and MASTER_PORT, over its own
connection. It also reads the heartbeats of all ranks, at least ``BEATS`` times within the time limit.

A rank that makes no progress itself ends the run. It prints one line that names another rank and its last phase, if
that rank is

    silent      it sent no heartbeat for half the limit: the process is stopped or dead, or its machine is
    late        no rank made progress for nine tenths of the limit. The ranks with the fewest phases are late,
                unless one of them is in a phase without a deadline

Both limits are shorter than the time-out of collective calls, which names no rank. Time is counted in this rank's own
intervals and not by the clock. So a job whose processes are all suspended and later resumed is not aborted.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from framestream.trainer.distributed.process_group import DistributedContext, all_reduce_max_int
from framestream.trainer.distributed.run_store import open_store

BEATS = 60  #: heartbeats within the time limit, at least
MAX_INTERVAL = 10.0  #: seconds between heartbeats
MAX_NAMED = 3  #: most ranks that an error names


@dataclass(frozen=True)
class Heartbeat:
    """The last report of a rank."""

    number: int  #: grows with each heartbeat
    phase_count: int  #: phases this rank has begun; all ranks begin the same phases in the same order
    phase: str  #: the current phase
    machine: str  #: host name and process id
    call: str = ""  #: the last model call, where ``train.check_calls`` counts them
    no_deadline: bool = False  #: the other ranks wait for this phase without a limit


class StallDetector:
    """Decides from heartbeats which rank blocks the run. Reads no clock and does no I/O.

    Args:
        rank: the rank that judges.
        seconds: the time limit.
        interval: seconds between two calls of :meth:`check`.
    """

    def __init__(self, rank: int, seconds: float, interval: float) -> None:
        self._rank, self._interval = rank, interval
        self._silent_limit, self._late_limit = 0.5 * seconds, 0.9 * seconds
        self._last: Sequence[Heartbeat] = []
        self._silent_intervals: list[int] = []  #: for each rank: intervals without a new heartbeat
        self._stalled_intervals: list[int] = []  #: for each rank: intervals without a new phase

    def check(self, beats: Sequence[Heartbeat]) -> str | None:
        """Take the newest heartbeats of all ranks, once an interval; return the error that ends the run, or None."""
        if not beats or not self._last:  # the first heartbeats: nothing to compare with
            self._last = beats
            self._silent_intervals, self._stalled_intervals = [0] * len(beats), [0] * len(beats)
            return None
        self._count_intervals(beats)
        silent = [
            rank for rank, count in enumerate(self._silent_intervals) if self._seconds(count) >= self._silent_limit
        ]
        alive = [rank for rank in range(len(beats)) if rank not in silent or rank == self._rank]
        stalled = self._seconds(self._stalled_intervals[self._rank])
        if self._rank != alive[0]:  # the first rank alive reports; another one only if the first cannot
            stalled -= 2 * self._interval
        if silent:
            return self._silent_error(silent) if stalled >= self._silent_limit else None
        if stalled >= self._late_limit and not any(beat.no_deadline for beat in beats):
            return self._late_error()
        return None

    def _count_intervals(self, beats: Sequence[Heartbeat]) -> None:
        for rank, (beat, last) in enumerate(zip(beats, self._last, strict=True)):
            self._silent_intervals[rank] = 0 if beat.number != last.number else self._silent_intervals[rank] + 1
            self._stalled_intervals[rank] = (
                0 if beat.phase_count != last.phase_count else self._stalled_intervals[rank] + 1
            )
        self._last = beats

    def _seconds(self, intervals: int) -> float:
        return intervals * self._interval

    def _silent_error(self, silent: list[int]) -> str:
        seconds = self._seconds(max(self._silent_intervals[rank] for rank in silent))
        if self._rank in silent:  # this rank's own heartbeats do not arrive either: the store is gone
            return (
                f"no sign of life for {seconds:.0f} s from {self._describe([0])}, "
                "or the launcher that passes its messages on,"
            )
        return f"no sign of life for {seconds:.0f} s from {self._describe(silent)}"

    def _late_error(self) -> str:
        fewest = min(beat.phase_count for beat in self._last)
        late = [rank for rank, beat in enumerate(self._last) if beat.phase_count == fewest]
        seconds = self._seconds(max(self._stalled_intervals[rank] for rank in late))
        if len(late) < len(self._last):
            return f"the ranks have waited {seconds:.0f} s for {self._describe(late)}"
        why = "they call different things (train.check_calls names them) or cannot reach each other"
        return f"no rank has made progress for {seconds:.0f} s: {self._describe(late)}; {why}"

    def _describe(self, ranks: list[int]) -> str:
        named = []
        for rank in ranks[:MAX_NAMED]:
            beat = self._last[rank]
            named.append(f"rank {rank} ({', '.join(filter(None, (beat.machine, beat.phase, beat.call)))})")
        return "; ".join([*named, *([f"{len(ranks) - MAX_NAMED} more"] if len(ranks) > MAX_NAMED else [])])


class Watchdog:
    """Sends and checks heartbeats in two threads until it is closed. Does nothing in a run of one rank.

    Args:
        minutes: the time limit, ``train.timeout_minutes``.
        context: this rank. All ranks create their watchdogs at the same time.
    """

    def __init__(self, minutes: float, context: DistributedContext) -> None:
        self.last_call: Callable[[], str] = str  #: returns the last model call of this rank
        self._rank, self._world = context.rank, context.world
        self._machine = f"{socket.gethostname()}, process {os.getpid()}"
        self._phase = (0, "starting", False)  #: phase_count, phase and no_deadline, replaced together
        self._interval = min(MAX_INTERVAL, minutes * 60 / BEATS)
        self._detector = StallDetector(context.rank, minutes * 60, self._interval)
        self._received: list[Heartbeat] = []
        self._closed = threading.Event()
        if context.world == 1:
            return
        self._store = open_store(minutes)
        self._send(0)
        all_reduce_max_int(0, context)  # every rank has sent a heartbeat
        for name, work in (("send", self._exchange), ("check", self._check)):
            threading.Thread(target=work, daemon=True, name=f"heartbeat_{name}").start()

    def set_phase(self, phase: str, no_deadline: bool = False) -> None:
        """Begin ``phase``, such as "backward pass of global batch 3". Every rank begins the same number of phases.

        ``no_deadline``: the phase may exceed the time limit, because no collective call waits for it.
        """
        self._phase = (self._phase[0] + 1, phase, no_deadline)

    def close(self) -> None:
        """Stop both threads. From now on no rank waits for another."""
        self._closed.set()

    def _exchange(self) -> None:
        """Send a heartbeat and read all others, once an interval.

        This thread may block, because the host of the store may be the machine that has stopped.
        """
        keys = [f"heartbeat/{rank}" for rank in range(self._world)]
        number = 0
        try:
            while not self._closed.wait(self._interval):
                number += 1
                self._send(number)
                self._received = [Heartbeat(**json.loads(text)) for text in self._store.multi_get(keys)]
        except RuntimeError:
            return  # the store is gone, with rank 0 or the launcher: no more heartbeats arrive

    def _send(self, number: int) -> None:
        count, phase, no_deadline = self._phase
        beat = Heartbeat(number, count, phase, self._machine, self.last_call(), no_deadline)
        self._store.set(f"heartbeat/{self._rank}", json.dumps(asdict(beat)))

    def _check(self) -> None:
        """Check the heartbeats once an interval, and end the process on a fault."""
        while not self._closed.wait(self._interval):
            beats = list(self._received)
            if beats:  # this rank's own progress is known here before it reaches the store
                count, phase, no_deadline = self._phase
                beats[self._rank] = replace(beats[self._rank], phase_count=count, phase=phase, no_deadline=no_deadline)
            fault = self._detector.check(beats)
            if fault and not self._closed.is_set():
                print(f"error: {fault}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread is in a collective call, which an exception does not reach
