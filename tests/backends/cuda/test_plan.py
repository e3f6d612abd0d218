"""The planner: what it chooses fits, waits only for blocks that are there, and is few kernels for many sizes."""

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest

from gradkernels.backends.cuda import costs, plan
from gradkernels.cells import CELLS, get
from gradkernels.cells.codegen import COMPILED

LSTM = CELLS["lstm"]


@dataclass(eq=False)
class Paper:
    """A GPU that compiles nothing and counts as it is told."""

    capability: tuple[int, int] = (9, 0)
    multiprocessors: int = 132
    shared_bytes: int = 232448
    max_cluster: int = 16
    resident: object = None  # variant -> clusters at a time; None: a block on every multiprocessor
    fails: object = None  # variant -> an error, or None
    spills: object = None  # variant -> bytes
    name: str = "paper"
    asked: list = field(default_factory=list)

    def kernel(self, variant):
        self.asked.append(variant)
        if self.fails is not None and self.fails(variant):
            raise RuntimeError(f"{self.fails(variant)}\nand much more")
        return Kernel(self, variant)


@dataclass
class Kernel:
    machine: Paper
    variant: object

    @property
    def spilled(self):
        return self.machine.spills(self.variant) if self.machine.spills else 0

    def resident(self):
        m = self.machine
        return m.resident(self.variant) if m.resident else m.multiprocessors // self.variant.C


def h200(**more):
    return Paper(name="H200", **more)


def a100(**more):
    return Paper((8, 0), 108, 166912, name="A100", **{"max_cluster": 1, **more})


def rtx(**more):
    return Paper((12, 0), 170, 101376, 8, name="RTX 5090", **more)


def check(machine, chosen, cell, number, H, B, which):
    """What must hold of any plan."""
    assert chosen.kind in ("cluster", "grid", "step") and chosen.why
    if chosen.kind == "step":
        assert chosen.variant is None
        return
    v = chosen.variant
    assert (v.cell, v.number, v.exchange) == (cell, number, chosen.kind) and v.fits
    assert v.shared_bytes <= machine.shared_bytes and v.threads <= 1024
    assert v.registers <= 255 and v.registers * v.threads <= 65536
    assert v.C <= (machine.max_cluster if machine.capability >= (9, 0) else 1)
    assert v.H >= H and chosen.team * v.U >= H > 0
    assert chosen.blocks % chosen.team == 0 and chosen.team % v.C == 0
    assert 1 <= chosen.blocks // chosen.team <= -(-B // v.N), "a team without rows"
    assert chosen.blocks <= v.C * machine.kernel(v).resident(), "blocks that are not resident"
    if v.exchange == "cluster":
        assert chosen.team == v.C
        assert v.exchange_bytes(chosen.team) == 0, "a cluster has nothing in L2"


@pytest.mark.parametrize("machine", [h200, a100, rtx], ids=["H200", "A100", "RTX"])
@pytest.mark.parametrize("which", ["forward", "backward"])
def test_every_choice_fits(machine, which):
    """Odd sizes and usual ones, every cell and number type."""
    gpu, draw = machine(), random.Random(which)
    sizes = [1, 2, 7, 8, 31, 63, 100, 128, 129, 255, 256, 511, 512, 640, 768, 1000, 1024, 1500, 2048, 4096]
    kinds = set()
    for cell in map(get, COMPILED):
        for H in draw.sample(sizes, 5):
            number = draw.choice(["bf16", "fp16", "tf32", "fp32"])
            for B in (1, draw.randrange(2, 100), 3000):
                chosen = plan.plan(gpu, cell, number, H, B, which)
                check(gpu, chosen, cell, number, H, B, which)
                kinds.add(chosen.kind)
    assert kinds == {"cluster", "grid", "step"}


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_kinds_by_size(which):
    """Few units and rows: a cluster. Too many units for one: a grid. So many rows that a library is busy: step by step."""
    kind = lambda H, B: plan.plan(h200(), LSTM, "bf16", H, B, which).kind
    assert [kind(H, 8) for H in (32, 256, 512)] == ["cluster"] * 3
    assert [kind(H, 8) for H in (1024, 2048)] == ["grid"] * 2
    assert [kind(H, 4096) for H in (768, 1024, 2048)] == ["step"] * 3


def test_without_clusters_there_is_the_plain_grid():
    gpu = a100(max_cluster=16)
    chosen = plan.plan(gpu, LSTM, "bf16", 512, 8, "forward")
    assert chosen.kind == "grid" and {v.C for v in gpu.asked} == {1} and "in clusters" not in chosen.why


# ---------------------------------------------------------------- blocks that wait


@pytest.mark.parametrize("which", ["forward", "backward"])
@pytest.mark.parametrize("room", [0, 1, 7, 33, 60, 95])
def test_never_more_waiting_blocks_than_run_at_the_same_time(which, room):
    """With room for so many blocks, whatever their clusters: a smaller team, or step by step; the refusals say why."""
    gpu = h200(resident=lambda v: room // v.C)
    for H, B in ((64, 3), (768, 1), (1024, 16), (2048, 1), (2048, 40)):
        chosen = plan.plan(gpu, LSTM, "bf16", H, B, which)
        check(gpu, chosen, LSTM, "bf16", H, B, which)
        assert chosen.blocks <= room
        if chosen.kind == "step" and room:
            assert any("wait for one another" in reason for _, reason in chosen.refused) or H * B > 2048
    if room == 0:
        assert chosen.kind == "step" and any("and 0 run at the same time" in reason for _, reason in chosen.refused)


def test_clusters_that_the_driver_does_not_have():
    """An error when they are counted, or none at a time: the next smaller is taken, and large ones are asked for once."""
    for gpu in (
        h200(fails=lambda v: "CUDA_ERROR_INVALID_CLUSTER_SIZE" if v.C == 16 else None),
        h200(resident=lambda v: 0 if v.C == 16 else 8),
    ):
        chosen = plan.plan(gpu, LSTM, "bf16", 512, 8, "forward")
        check(gpu, chosen, LSTM, "bf16", 512, 8, "forward")
        assert chosen.kind != "step" and chosen.variant.C < 16
        assert [v.C for v in gpu.asked].count(16) == 1
        (reason,) = [reason for what, reason in chosen.refused if "cluster of 16" in what]
        assert reason in (
            "CUDA_ERROR_INVALID_CLUSTER_SIZE",
            "its 16 blocks wait for one another, and 0 run at the same time",
        )


def test_nothing_compiles():
    gpu = h200(fails=lambda v: "a CUDA kernel does not compile: forward.cuh(1): error: expected")
    chosen = plan.plan(gpu, LSTM, "bf16", 512, 8, "forward")
    assert chosen.kind == "step" and chosen.blocks == 0
    assert {reason for _, reason in chosen.refused} == {
        "a CUDA kernel does not compile: forward.cuh(1): error: expected"
    }
    assert len(gpu.asked) < 30


# ---------------------------------------------------------------- few kernels


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_few_kernels_for_many_batches(which):
    gpu = h200()
    plans = [plan.plan(gpu, LSTM, "bf16", 512, B, which) for B in range(1, 400)]
    assert len({p.variant for p in plans}) <= 8 and len(set(gpu.asked)) <= 20
    cycles = [p.cycles for p in plans]
    assert all(b > 0.8 * a for a, b in itertools.pairwise(cycles)), "more rows are hardly ever cheaper"


def test_widths_share_kernels():
    gpu = h200()
    variants = {plan.plan(gpu, LSTM, "bf16", H, 8, "forward").variant for H in range(449, 513, 9)}
    assert len(variants) <= 3


def test_a_plan_is_made_once():
    gpu = h200()
    first = plan.plan(gpu, LSTM, "bf16", 512, 8, "backward")
    asked = len(gpu.asked)
    assert plan.plan(gpu, LSTM, "bf16", 512, 8, "backward") is first and len(gpu.asked) == asked
    assert plan.plan(gpu, LSTM, "bf16", 512, 8, "backward", norms=True).variant.NORMS and not first.variant.NORMS


# ---------------------------------------------------------------- registers


def test_what_is_spilled_goes_to_shared_memory():
    """The compiler's word counts: with fewer registers for the matrix it is compiled again."""
    before = plan.plan(h200(), LSTM, "bf16", 512, 8, "forward").variant
    most = before.KEPT - 3
    after = plan.plan(h200(spills=lambda v: 40 * max(0, v.KEPT - most)), LSTM, "bf16", 512, 8, "forward").variant
    assert after.KEPT <= most and after.KEPT + after.SHARED >= before.KEPT + before.SHARED
    gpu = h200(spills=lambda v: 1000)
    stubborn = plan.plan(gpu, LSTM, "bf16", 512, 8, "forward")
    check(gpu, stubborn, LSTM, "bf16", 512, 8, "forward")


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_costs_grow_with_what_is_done(which):
    gpu = h200()
    v = plan.plan(gpu, LSTM, "bf16", 768, 16, which).variant
    cost = costs.tile(v, which)
    assert costs.tile(replace(v, N=2 * v.N), which) > cost
    assert costs.tile(replace(v, H=2 * v.H, U=2 * v.U), which) > cost
    assert costs.tile(replace(v, KEPT=0, SHARED=0), which) > cost, "from L2 in every step"
    kept = lambda number: costs.tile(replace(v, KEPT=1000, N=64, number=number), which)
    assert kept("fp32") > kept("tf32") > kept("fp16") == kept("bf16")
    assert costs.tile(replace(v, cell=CELLS["gru_reset_before"]), which) > costs.tile(
        replace(v, cell=CELLS["gru"]), which
    )
    for more in ((2 * 768, 16), (768, 16 * 1000)):
        assert costs.step(LSTM, "bf16", *more, 132) > costs.step(LSTM, "bf16", 768, 16, 132)


# ---------------------------------------------------------------- for people


def test_description():
    gpu = h200(fails=lambda v: "no clusters of 16 today" if v.C == 16 else None)
    text = plan.describe(gpu, LSTM, "bf16", 512, 8)
    first, *lines, last = text.splitlines()
    assert first.startswith("lstm, 512 units, 8 rows, bf16 on H200 (sm_90, 132 multiprocessors, 232448 bytes")
    assert [line.split(":")[0] for line in lines if not line.startswith(" ")] == ["forward", "backward"]
    assert "  not cluster of 16 blocks, 32 units each" in text and "no clusters of 16 today" in text
    assert last == "times are a model's, of constants that have not been measured"
    assert "no clusters)" in plan.describe(a100(), LSTM, "bf16", 4096, 4096)
