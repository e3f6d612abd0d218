"""Whether the tests would see a missing synchronisation: every synchronising call is left out in turn.

A site is found by running, so that a new one is covered as soon as it is written. It has to make some case fault, hang or
change its values in some order, or else be seen by the race detector; one that nothing sees is not needed.
"""

import pytest
import torch

from tests.backends.cuda import test_extra
from tests.cuda_on_cpu.machine import Hang, Schedule, Twin, objects, twin  # noqa: F401 - a fixture
from tests.cuda_on_cpu.replay import capture, findings, missed_without
from tests.cuda_on_cpu.test_twin import EXCHANGES, NAMES, Args
from tests.cuda_on_cpu.walks import Walk
from tests.ops.case import Case


def small_case(small):
    buffers, out, counter = torch.zeros(2, 8), torch.zeros(8), torch.zeros(1)
    return capture(Twin().kernel(small), 4, Args(buffers.data_ptr(), out.data_ptr(), counter.data_ptr(), 5, 0))


@pytest.mark.parametrize("small", EXCHANGES, ids=NAMES)
def test_small_exchanges(small):
    case = small_case(small)
    assert not findings(case)
    found = missed_without([case])
    assert len(found) == (4 if small.struct == "Talk" else 5) and all(found.values()), found


def test_a_warp_that_falls_behind():
    """It only waits; the signal goes on without it, and is in another phase when it comes."""
    case = small_case(EXCHANGES[0])
    (site,) = [s for s in case.run().sites if s.endswith("block_sync")]
    runs = [case.run("plain", Schedule("starve", warp), left_out=site) for warp in range(case.warps)]
    assert {r.outcome for r in runs} == {"done", "hang"}, runs
    assert all("signal_wait for parity 0, phases complete 2" in r.report for r in runs if r.outcome == "hang")


# ---------------------------------------------------------------- the recurrent kernels

# Every exchange with and without clusters, with one and two products a step, with parts of the contraction in several warps
# and in one; rows that end, begin late or never come; units that no tile is full of; two tiles of rows in turn and at once;
# weights in registers, in shared memory and from L2.
WALKS = [
    Walk(Case("lstm", T=4, B=13, I=3, H=61, layout="packed", reverse=True), "bf16", "cluster", 4, 64, 16, 8, 1, 2, 1, 0, 4),
    Walk(Case("gru_reset_before", T=4, B=10, I=3, H=20), "fp32", "cluster", 2, 32, 16, 8, 2, 1, 1, 1, 2),
    Walk(Case("rnn_tanh", T=3, B=9, I=3, H=29), "fp16", "cluster", 1, 32, 32, 8, 2, 2, 0, 1, 1, 2),
    Walk(Case("gru", T=4, B=13, I=3, H=29, layout="lengths"), "bf16", "grid", 1, 32, 8, 8, 1, 2, 1, 0, 4),
    Walk(Case("lstm", T=3, B=13, I=3, H=32), "tf32", "grid", 2, 32, 8, 8, 1, 2, 0, 1, 4),
    Walk(Case("gru_reset_before", T=4, B=12, I=3, H=27, layout="lengths", reverse=True), "bf16", "grid", 2, 32, 8, 8, 2, 1, 0, 0, 4, 2),
]  # fmt: skip
STEPWISE = Walk(Case("lstm", T=2, B=5, I=3, H=7, layout="lengths"), "fp32", "step", 1, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="module")
def recorded():
    """Every launch of the walks, forward and backward, by walk."""
    variants = [v for w in WALKS for v in w.variants()]
    for sanitizer in ("plain", "thread", "address"):
        objects(variants, sanitizer)
    return {w: w.record(Twin()) for w in (*WALKS, STEPWISE)}


@pytest.mark.slow
@pytest.mark.parametrize("walk", [*WALKS, STEPWISE], ids=str)
def test_clean(walk, recorded):
    """Values are those of the reference (asked for where they are recorded), the same bits in every order, and no sanitizer
    has anything to say."""
    cases = recorded[walk]
    assert {type(c.variant).__name__ for c in cases} == (
        {"StepForward", "StepBackward"} if walk is STEPWISE else {"Forward", "Backward"}
    )
    assert not [f for c in cases for f in findings(c)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernel, some",
    [
        ("Forward", ["wait_reached", "signal_wait", "hear"]),
        ("Backward", ["wait_reached", "signal_wait"]),
        ("StepBackward", []),
    ],
)
def test_every_site(kernel, some, recorded):
    found = missed_without([c for cases in recorded.values() for c in cases if type(c.variant).__name__ == kernel])
    assert found and all(any(site.endswith(s) for site in found) for s in some), found
    assert not [site for site, how in found.items() if not how]


@pytest.mark.slow
@pytest.mark.parametrize("walk", WALKS, ids=str)
def test_banks(walk, recorded):
    """No load_tiles has to go to shared memory twice for one tile."""
    machine = Twin()
    walk.record(machine)
    assert [machine.kernel(variant).bank_conflicts for variant, _ in machine.launches] == [0, 0]


def test_kernels_that_are_not_all_resident():
    walk = next(w for w in WALKS if w.exchange == "grid")
    with pytest.raises(
        Hang, match="(?s)block 3, .* not started: only 3 blocks are resident.*wait_reached for 4, reached is 3"
    ):
        walk.record(Twin(resident=3))


def test_the_grid_before_sm_90():
    walk = next(w for w in WALKS if w.exchange == "grid" and w.C == 1)
    assert len(walk.record(Twin(capability=(8, 0)))) == 2


# ---------------------------------------------------------------- means and what a cell without a product adds up


@pytest.mark.slow
@pytest.mark.parametrize("cell", [test_extra.CELLS["gru_layer_norm"], test_extra.AROUND[5]], ids=lambda c: c.name)
def test_sites_of_means(cell, twin):  # noqa: F811
    """Blocks of a step that meet: for sums of a row, and between the steps of a launch that does them all."""
    given, extra = test_extra.make(cell, "lengths", False, H=12, T=3, B=2)
    cases = []
    twin.watch = lambda kernel, *launch: cases.append(capture(kernel, *launch, cell.name))
    test_extra.run(test_extra.cuda, given, extra)
    cases = cases[: len(cases) // 2 + 1]  # forward, and backward with norms
    assert not [f for c in {type(c.variant): c for c in cases}.values() for f in findings(c)]
    found = missed_without(list({type(c.variant): c for c in cases}.values()))
    assert found and all(found.values()), found
