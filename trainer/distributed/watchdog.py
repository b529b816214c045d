"""Who is late: every rank says what it is doing, all ranks listen, and a run that stands still ends with a name.

Ranks meet in collective calls, where one that is stopped, swaps or waits for a disk holds up all others without a word.
So each rank writes a *beat* into the launcher's key-value store (the one at MASTER_ADDR and MASTER_PORT, through a
connection of its own) and reads those of the others, at least ``BEATS`` times in the time limit. A rank that has got
nowhere itself ends the run, with one line that names another and what it was doing, when the other is

    silent      no beat for half the limit: it is stopped or dead, or its machine is
    late        none of the ranks got anywhere for nine tenths of the limit: the ones that have come least far are late,
                unless one of them does what is waited for without a limit

Both come before the collective calls' own time-out, which names nobody. Time is counted in the listener's own beats and
not by the clock, so that a job which is stopped as a whole, and goes on, is not ended for it.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

from torch.distributed import TCPStore

from framestream.trainer.distributed.process_group import DistributedContext, barrier

BEATS = 60  #: in the time limit, at least
LONGEST = 10.0  #: seconds between beats
NAMED = 3  #: ranks that a line names at most


@dataclass(frozen=True)
class Heartbeat:
    """What a rank last said."""

    number: int  #: grows with each beat
    place: int  #: how many things the rank has begun; every rank begins the same things in the same order
    phase: str  #: what it began last
    machine: str  #: host name and process id
    call: str = ""  #: the model call it has reached, where ``train.check_calls`` counts them
    no_deadline: bool = False  #: the others wait for what it does without a limit


class StallDetector:
    """Judges what is heard; pure arithmetic on beats.

    Args:
        rank: the listener.
        seconds: the time limit.
        interval: seconds between two calls of :meth:`look`.
    """

    def __init__(self, rank: int, seconds: float, interval: float) -> None:
        self._rank, self._interval = rank, interval
        self._silent, self._late = 0.5 * seconds, 0.9 * seconds
        self._last: Sequence[Heartbeat] = []
        self._same_beat: list[int] = []  #: intervals for which each rank has said nothing
        self._same_place: list[int] = []  #: intervals for which each rank has begun nothing

    def check(self, beats: Sequence[Heartbeat]) -> str | None:
        """One interval later, ``beats`` are the last of all ranks; the line that ends the run, or None."""
        if not beats or not self._last:  # nobody was heard before
            self._last = beats
            self._same_beat, self._same_place = [0] * len(beats), [0] * len(beats)
            return None
        for rank, (beat, last) in enumerate(zip(beats, self._last, strict=True)):
            self._same_beat[rank] = 0 if beat.number != last.number else self._same_beat[rank] + 1
            self._same_place[rank] = 0 if beat.place != last.place else self._same_place[rank] + 1
        self._last = beats
        silent = [rank for rank, since in enumerate(self._same_beat) if since * self._interval >= self._silent]
        unheard = self._rank in silent  # whoever passes the beats on is silent itself
        alive = [rank for rank in range(len(beats)) if rank not in silent or rank == self._rank]
        turn = 0.0 if self._rank == alive[0] else 2 * self._interval  # the first speaks, others only if it cannot
        standing = self._same_place[self._rank] * self._interval - turn
        if silent and standing >= self._silent:
            seconds = self._interval * max(self._same_beat[rank] for rank in silent)
            keeper = ", or the launcher that passes its messages on," if unheard else ""
            return f"no sign of life for {seconds:.0f} s from {self._name([0] if unheard else silent)}{keeper}"
        if not silent and standing >= self._late and not any(beat.no_deadline for beat in beats):
            least = min(beat.place for beat in beats)
            late = [rank for rank in alive if beats[rank].place == least]
            seconds = self._interval * max(self._same_place[rank] for rank in late)
            if len(late) < len(beats):
                return f"the ranks have waited {seconds:.0f} s for {self._name(late)}"
            why = "they call different things (train.check_calls names them) or cannot reach each other"
            return f"no rank has got on for {seconds:.0f} s: {self._name(late)}; {why}"
        return None

    def _name(self, ranks: list[int]) -> str:
        named = []
        for rank in ranks[:NAMED]:
            beat = self._last[rank]
            named.append(f"rank {rank} ({', '.join(filter(None, (beat.machine, beat.phase, beat.call)))})")
        return "; ".join([*named, *([f"{len(ranks) - NAMED} more"] if len(ranks) > NAMED else [])])


class Watchdog:
    """Beats and listens in threads until it is closed; does nothing where there is one rank.

    Args:
        minutes: the time limit, ``train.timeout_minutes``.
        place: this rank; every rank makes its own at the same time.
    """

    def __init__(self, minutes: float, place: DistributedContext) -> None:
        self.call: Callable[[], str] = str  #: says which model call this rank has reached
        self._rank, self._world = place.rank, place.world
        self._machine = f"{socket.gethostname()}, process {os.getpid()}"
        self._begun = (0, "starting", False)
        self._interval = min(LONGEST, minutes * 60 / BEATS)
        self._watch = StallDetector(place.rank, minutes * 60, self._interval)
        self._heard: list[Heartbeat] = []
        self._closed = threading.Event()
        if place.world == 1:
            return
        self._run = f"framestream/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        self._store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(minutes=minutes),
        )
        self._say(0)
        barrier()  # every rank has said something
        for work in (self._talk, self._listen):
            threading.Thread(target=work, daemon=True, name=f"heartbeat{work.__name__}").start()

    def set_phase(self, what: str, unhurried: bool = False) -> None:
        """This rank begins ``what``, such as "backward of global batch 3"; every rank says as many things.

        ``unhurried``: it may take longer than the limit, because no collective call waits for it.
        """
        self._begun = (self._begun[0] + 1, what, unhurried)

    def close(self) -> None:
        """Stop beating and listening: from now on no rank waits for another."""
        self._closed.set()

    def _talk(self) -> None:
        """Beat and read all beats; a thread of its own, because the store's host may be what has stopped."""
        keys = [f"{self._run}/{rank}" for rank in range(self._world)]
        number = 0
        try:
            while not self._closed.wait(self._interval):
                number += 1
                self._say(number)
                self._heard = [Heartbeat(**json.loads(said)) for said in self._store.multi_get(keys)]
        except RuntimeError:
            return  # the store has gone, and rank 0 or the launcher with it: from now on nobody is heard

    def _say(self, number: int) -> None:
        place, doing, unhurried = self._begun
        beat = Heartbeat(number, place, doing, self._machine, self.call(), unhurried)
        self._store.set(f"{self._run}/{self._rank}", json.dumps(asdict(beat)))

    def _listen(self) -> None:
        while not self._closed.wait(self._interval):
            heard = list(self._heard)
            if heard:  # what this rank does it knows better than the store
                place, doing, unhurried = self._begun
                heard[self._rank] = replace(heard[self._rank], place=place, phase=doing, no_deadline=unhurried)
            fault = self._watch.check(heard)
            if fault and not self._closed.is_set():
                print(f"error: {fault}", file=sys.stderr, flush=True)
                os._exit(1)  # the main thread stands in a collective call, which no exception reaches
