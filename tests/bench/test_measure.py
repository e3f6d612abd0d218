"""Statistics, and rounds that a busy machine spoils, on a clock that the test turns."""

import gc
import os
import statistics

import pytest

from bench.measure import Disturbed, Plan, Spread, geometric_mean, interleaved, wait_share, waited, warm


class World:
    """A clock, and the time threads have waited for a core; calls take what they are told to."""

    def __init__(self):
        self.now = 0.0
        self.waiting = 0
        self.log = []

    def clock(self):
        return self.now

    def wait(self):
        return {"1": self.waiting}

    def call(self, name, seconds, waits=lambda: 0):
        def run():
            self.log.append(name)
            self.now += seconds
            self.waiting += waits()

        return run


@pytest.fixture
def world(monkeypatch):
    w = World()
    monkeypatch.setattr("bench.measure.time.perf_counter", w.clock)
    return w


def run(world, *calls, **more):
    return interleaved(calls, clock=world.clock, wait=world.wait, **{"budget": 1.0, "least": 3, **more})


@pytest.mark.parametrize(
    "samples, expected",
    [
        ([3.0], (3.0, 3.0, 3.0, 3.0)),
        ([1.0, 2.0], (1.5, 1.0, 1.25, 1.75)),
        ([5.0, 1.0, 3.0, 2.0, 4.0], (3.0, 1.0, 2.0, 4.0)),
        ([1.0, 1.0, 1.0, 9.0], (1.0, 1.0, 1.0, 3.0)),
    ],
)
def test_spread(samples, expected):
    s = Spread.of(samples)
    assert (s.median, s.min, s.q1, s.q3) == expected and s.samples == len(samples)
    assert s.median == statistics.median(samples)


def test_spread_of_nothing():
    with pytest.raises(ValueError, match="no samples"):
        Spread.of([])


def test_geometric_mean():
    assert geometric_mean([1.0, 4.0, 2.0]) == pytest.approx(2.0)


def test_medians_in_milliseconds_per_call(world):
    (fast, slow), counted, dropped = run(world, world.call("fast", 0.002), world.call("slow", 0.05))
    assert fast.median == pytest.approx(2.0) and slow.median == pytest.approx(50.0)
    assert counted >= 3 and dropped == 0


def test_short_calls_are_timed_together(world):
    (s,), _, _ = run(world, world.call("tiny", 1e-5), budget=0.1)
    assert s.median == pytest.approx(0.01)
    assert Plan.of(1e-5).lead == 500 and Plan.of(1e-5).calls == 25 and Plan.of(0.01).lead == 1
    assert Plan.of(0.001).calls == 1
    assert Plan.of(0.5).samples == 1 and Plan.of(0.05).samples == 3 and Plan.of(0.001).samples == 20


def test_providers_take_turns_at_being_first(world):
    run(world, world.call("a", 0.2), world.call("b", 0.2), budget=1.0)
    turns = "".join(world.log)
    assert "aabb" in turns and "bbaa" in turns


def test_rounds_that_waited_for_a_core_are_dropped(world):
    def busy_for_a_while():
        return 0 if 4 < world.now < 8 else 100_000_000

    calls = world.call("a", 0.1, busy_for_a_while), world.call("b", 0.3)
    (a, b), counted, dropped = run(world, *calls, budget=3.0, least=2)
    assert counted >= 1 and dropped >= 3
    assert a.samples == counted * Plan.of(0.1).samples and b.samples == counted * Plan.of(0.3).samples


def test_a_little_waiting_is_allowed(world):
    _, counted, dropped = run(world, world.call("a", 0.1, lambda: 1_000_000))
    assert counted and not dropped
    with pytest.raises(Disturbed):
        run(world, world.call("a", 0.1, lambda: 1_000_000), share=0.001)


def test_a_busy_machine_is_an_error_after_some_patience(world):
    with pytest.raises(Disturbed, match="busy"):
        run(world, world.call("a", 0.1, lambda: 100_000_000), budget=1.0)
    assert world.now < 20


def test_systems_that_do_not_tell(world):
    _, counted, dropped = interleaved([world.call("a", 0.1)], 1.0, 3, clock=world.clock, wait=lambda: None)
    assert counted and not dropped


def test_the_collector_is_off_meanwhile_and_on_again(world):
    seen = []
    interleaved(
        [lambda: (seen.append(gc.isenabled()), world.call("a", 0.1)())], 0.5, 2, clock=world.clock, wait=world.wait
    )
    assert seen[-1] is False and gc.isenabled()


def test_warm_gives_the_fastest(world):
    took = iter([0.3, 0.1, 0.2, 0.2, 0.2, 0.2])

    def call():
        world.now += next(took)

    assert warm(call, 0.5) == pytest.approx(0.1)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="only Linux tells how long threads waited")
def test_waited_counts_up():
    before = waited()
    assert before and all(ns >= 0 for ns in before.values())
    after = waited()
    assert all(after[thread] >= ns for thread, ns in before.items() if thread in after)


@pytest.mark.parametrize(
    "before, after, share",
    [
        ({"1": 100}, {"1": 250_000_100}, 0.5),
        ({"1": 0, "2": 0}, {"1": 100_000_000, "2": 150_000_000}, 0.5),
        ({}, {"7": 50_000_000}, 0.1),  # a thread begun since
        ({"1": 10**12}, {"2": 0}, 0.0),  # one that has ended
        ({"1": 0}, {"1": 2**63}, 1.0),
        ({"1": 5}, {"1": 0}, 0.0),
        (None, None, 0.0),
    ],
)
def test_share_of_waiting(before, after, share):
    assert wait_share(before, after, 0.5) == pytest.approx(share)
