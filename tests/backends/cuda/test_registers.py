"""What ships compiles for every architecture; registers are bounded, none are spilled, and neither grows unnoticed."""

import pytest

from gradkernels.backends.cuda import nvrtc
from tests.backends.cuda import registers

# Kernels that spill registers all the same: case -> bytes that a thread writes and reads for them.
SPILLS: dict[str, int] = {
    "sm_100a backward lstm_layer_norm bf16 step": 52,
    "sm_120 backward lstm_layer_norm bf16 step": 20,
}
SLACK = 8  # registers more than recorded that nobody needs to explain
OTHER_COMPILER = 24  # more of them, for a version of NVRTC that did not write the table
AGAIN = "python -m tests.backends.cuda.registers writes the table anew"


@pytest.fixture(scope="module")
def found():
    return registers.measured()


@pytest.fixture(scope="module")
def table():
    return registers.recorded()


pytestmark = pytest.mark.slow


def test_the_table_is_of_these_kernels(table):
    assert list(table["kernels"]) == [str(c) for c in registers.CASES], AGAIN
    assert len(set(table["kernels"])) == len(registers.CASES)


def test_what_is_compiled():
    """Every cell, number type and exchange, in both directions; every architecture; with norms and without."""
    cases = registers.CASES
    cells = {*registers.COMPILED, *registers.STEPWISE}
    assert {(c.which, c.cell) for c in cases} == {(w, c) for w in ("forward", "backward") for c in cells}
    assert {c.number for c in cases} == {"bf16", "fp16", "tf32", "fp32"} and {c.norms for c in cases} == {True, False}
    assert {(c.arch, bool(c.H)) for c in cases} == {(a, h) for a in registers.GPUS for h in (True, False)}


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_exchanges(found, which):
    forms = {(c.arch, found[str(c)]["form"].split()[0]) for c in registers.CASES if c.which == which and c.H}
    assert forms >= {
        ("sm_90a", "cluster"),
        ("sm_90a", "grid"),
        ("sm_80", "grid"),
        ("sm_100a", "cluster"),
        ("sm_120", "cluster"),
    }


@pytest.mark.parametrize("case", [str(c) for c in registers.CASES])
def test_registers(found, table, case):
    now, before = found[case], table["kernels"][case]
    same = table["nvrtc"] == ".".join(map(str, nvrtc.version()))
    assert now["registers"] <= 255 and now["registers"] * now["threads"] <= 65536
    assert now["shared"] <= registers.GPUS[case.split()[0]].shared_bytes
    assert now["spilled"] <= SPILLS.get(case, 0) + (0 if same else 8 * OTHER_COMPILER), now
    assert now["registers"] <= before["registers"] + SLACK + (0 if same else OTHER_COMPILER), AGAIN


def test_expectations_are_about_right(found):
    """The planner fills registers by what a variant says of itself: a thread's need is known to a fifth of what there are."""
    off = {case: (f["registers"], f["expected"]) for case, f in found.items() if f["form"] != "step"}
    assert {c: (got, want) for c, (got, want) in off.items() if abs(got - want) > 51} == {}
