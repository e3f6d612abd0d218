"""Time calls side by side: providers interleaved, medians and spread, rounds that the machine disturbed left out."""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WAIT = 0.02  # share of a round's wall time that threads may spend runnable without a core
LEAD = 5e-3  # seconds of untimed calls, one at least: for so long OpenMP threads of the provider before may still spin
BLOCK = 0.02  # seconds that the timed calls of one provider in one round fill, where calls are short
TICK = 2.5e-4  # shortest thing timed, in seconds: shorter calls are timed several together
PATIENCE = 8  # a busy machine may make a case take this many times its budget


class Disturbed(RuntimeError):
    """Other work on the machine left no round to count."""


@dataclass(frozen=True)
class Spread:
    """Of one provider's samples, in the unit of the row."""

    median: float
    min: float
    q1: float
    q3: float
    samples: int

    @staticmethod
    def of(samples: Sequence[float]) -> Spread:
        """Quartiles by linear interpolation; one sample is its own quartiles. ValueError without samples."""
        if not samples:
            raise ValueError("no samples")
        if len(samples) == 1:
            return Spread(samples[0], samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return Spread(median, min(samples), q1, q3, len(samples))


def waited() -> dict[str, int] | None:
    """Nanoseconds that each thread of this process has been runnable without a core; None where the system doesn't tell."""
    try:
        threads = os.listdir("/proc/self/task")
    except FileNotFoundError:
        return None
    found = {}
    for thread in threads:
        try:
            with open(f"/proc/self/task/{thread}/schedstat") as f:
                found[thread] = int(f.read().split()[1])
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended since
            continue
    return found


def wait_share(before: dict[str, int] | None, after: dict[str, int] | None, seconds: float) -> float:
    """What the threads waited between the two, over the wall time; 0 where the system doesn't tell.

    No thread waits longer than the wall time, whatever the kernel of a virtual machine says when its clock jumps.
    """
    if before is None or after is None:
        return 0.0
    return sum(min(max(ns - before.get(thread, 0), 0) / 1e9 / seconds, 1.0) for thread, ns in after.items())


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


@dataclass(frozen=True)
class Plan:
    """How one provider's calls are timed in a round: `lead` calls untimed, then `samples` times `calls` calls."""

    lead: int
    calls: int
    samples: int

    @staticmethod
    def of(seconds: float, tick: float = TICK) -> Plan:
        calls = max(1, round(tick / seconds))
        fit = int(BLOCK / (seconds * calls))
        return Plan(max(1, math.ceil(LEAD / seconds)), calls, 1 if seconds > 0.1 else max(3, min(20, fit)))


class HostWatch:
    """Times calls by the host's clock, which is right where a call has done its work when it returns."""

    tick = TICK

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock

    def settle(self) -> None:
        """Returns when everything that was asked for is done."""

    def samples(self, call: Callable[[], object], plan: Plan) -> list[float]:
        """Milliseconds of a call, `plan.samples` times."""
        for _ in range(plan.lead):
            call()
        found = []
        for _ in range(plan.samples):
            begin = self.clock()
            for _ in range(plan.calls):
                call()
            found.append((self.clock() - begin) * 1e3 / plan.calls)
        return found


def warm(
    call: Callable[[], object], seconds: float, least: int = 2, settle: Callable[[], object] = lambda: None
) -> float:
    """Calls it for about that long, `least` times at least; returns the seconds until the fastest had settled."""
    best, end, n = float("inf"), time.perf_counter() + seconds, 0
    while n < least or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        settle()
        best, n = min(best, time.perf_counter() - begin), n + 1
    return best


def interleaved(
    calls: Sequence[Callable[[], object]],
    budget: float = 3.0,
    least: int = 7,
    share: float = WAIT,
    clock=time.perf_counter,
    wait=waited,
    watch=None,
) -> tuple[list[Spread], int, int]:
    """Milliseconds per call of each, rounds counted, rounds dropped.

    A round runs every provider in turn, beginning with another one each time. The first calls are not timed: they pay for what
    the provider before did to caches, allocator and cores. A round in which threads waited for a core more than `share` of its time is dropped.
    Rounds go on for `budget` seconds, at least `least` of them; on a busy machine for up to eight times that.
    Disturbed if not one round was left. watch: what times the calls where the host's clock cannot, as HostWatch does.
    """
    watch = HostWatch(clock) if watch is None else watch
    plans = [Plan.of(warm(call, min(0.15, budget / 10), settle=watch.settle), watch.tick) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    counted = dropped = 0
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # nothing of ours makes cycles; a collection in the middle would be charged to whoever is running
    try:
        start = clock()
        while True:
            now = clock() - start
            if (now >= budget and counted >= least) or (now >= PATIENCE * budget and counted + dropped >= least):
                break
            before, begin = wait(), clock()
            row: list[list[float]] = [[] for _ in calls]
            for k in range(len(calls)):
                k = (k + counted + dropped) % len(calls)
                row[k] = watch.samples(calls[k], plans[k])
            after = wait()
            if wait_share(before, after, clock() - begin) > share:
                dropped += 1
                continue
            counted += 1
            for kept, new in zip(samples, row):
                kept.extend(new)
    finally:
        if collecting:
            gc.enable()
    if not counted:
        raise Disturbed(f"the machine is busy: in each of {dropped} rounds threads waited for a core")
    return [Spread.of(s) for s in samples], counted, dropped
