"""The whole CUDA backend on a GPU made of fibers: outputs, gradients and norms of `ops.recurrent` against the reference."""

import ctypes
import re
import subprocess
from dataclasses import replace

import pytest
import torch

import gradkernels as gk
from gradkernels import backends
from gradkernels.backends import cuda, reference
from gradkernels.backends.cuda import arguments, plan, step
from gradkernels.backends.cuda.backward import Backward
from gradkernels.backends.cuda.forward import Forward
from gradkernels.cells import CELLS, cell
from gradkernels.cells.codegen import COMPILED
from tests import place
from tests.close import assert_close_to_truth
from tests.cuda_on_cpu.machine import COMPILER, FLAGS, HERE, KERNELS, Schedule, Twin, twin  # noqa: F401 - a fixture
from tests.ops.case import Case, cotangents

# ---------------------------------------------------------------- running a case


@pytest.fixture
def on_twin(twin, monkeypatch):  # noqa: F811
    """`backend="cuda"` takes CPU tensors, for one test; float32 is multiplied as float32."""
    monkeypatch.setattr(backends, "_chosen", {})
    with place.tf32(False):
        yield twin


def run(case, values, backend, cotangent=None, probed=True):
    """Everything that comes out, by name: outputs, gradients, norms; and the cotangents that gradients were made with."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in values.items()}
    S = CELLS[case.cell].S
    probe = torch.zeros(case.T, S + 1, dtype=torch.double, requires_grad=True) if probed else None
    out = case.call(backend, probe=probe)(*leaves.values())
    cotangent = cotangents(out) if cotangent is None else cotangent
    wanted = [*leaves.values(), *([probe] if probed else [])]
    grads = torch.autograd.grad(out, wanted, [c.to(v.dtype) for c, v in zip(cotangent, out)])
    found = dict(zip([*(f"seq[{k}]" for k in range(S)), *(f"final[{k}]" for k in range(S))], out))
    found |= {f"d{k}": g for k, g in zip(leaves, grads)}
    if probed:  # float64 whatever it is made of, and judged as that; squares leave the range of float16
        made_of = torch.bfloat16 if out[0].dtype == torch.float16 else out[0].dtype
        found["norms"] = grads[-1].to(made_of)
    return found, cotangent


def check(case, dtype=torch.float32, values=None, as_good_as=None):
    """`as_good_as`: the dtype whose roundings are allowed, where that is not the dtype of the call."""
    low = case.tensors(dtype, requires_grad=False) if values is None else values
    wide = {k: v.double() for k, v in low.items()}
    truth, cotangent = run(case, wide, "reference")
    judged = as_good_as or dtype
    with pytest.MonkeyPatch.context() as patch:  # every operation rounds
        patch.setattr(reference, "precise", lambda v: v)
        theirs, _ = run(case, {k: v.to(judged) for k, v in low.items()}, "reference", cotangent)
    ours, _ = run(case, low, "cuda", cotangent)
    assert backends.last() == "cuda"
    if as_good_as:
        ours = {k: v.to(theirs[k].dtype) for k, v in ours.items()}
    assert_close_to_truth(ours, theirs, {k: v.double() for k, v in truth.items()}, name=f"{case} {dtype}")


# ---------------------------------------------------------------- plans


def force(monkeypatch, choose):
    """choose(cell, number, H, B, which, norms) -> Plan, in the planner's place."""
    monkeypatch.setattr(plan, "plan", lambda machine, *call, norms=False: choose(*call, norms))


@pytest.fixture
def stepwise(on_twin, monkeypatch):
    """Every call goes step by step."""
    force(monkeypatch, lambda *call: plan.Plan("step", None, 0, 0, "it was asked for", (), 0.0))
    return on_twin


# Small enough that several blocks share 32 units; a part of the matrix in registers, one in shared memory, the rest in L2.
FORMS = {
    "cluster": {"exchange": "cluster", "C": 4, "H": 32, "U": 8, "N": 8, "WM": 1, "WK": 2, "KEPT": 1, "SHARED": 1},
    "grid": {"exchange": "grid", "C": 1, "H": 32, "U": 16, "N": 8, "WM": 2, "WK": 1, "KEPT": 1, "SHARED": 1},
    "joined": {"exchange": "grid", "C": 2, "H": 64, "U": 8, "N": 8, "WM": 2, "WK": 2, "KEPT": 1, "SHARED": 0},
}


def form(name, teams=1):
    """Every call runs in the form of that name, by so many teams."""

    def choose(cell, number, H, B, which, norms):
        made = {"forward": Forward, "backward": Backward}[which](cell, number, **FORMS[name])
        made = replace(made, NORMS=norms) if which == "backward" else made
        team = made.C if made.exchange == "cluster" else 32 // made.U
        return plan.Plan(made.exchange, made, teams * team, team, f"{name} was asked for", (), 0.0)

    return choose


# ---------------------------------------------------------------- kernels that walk the sequence

LAYOUTS = [(layout, reverse) for layout in ("dense", "packed", "lengths") for reverse in (False, True)]
FEW = ("rnn_relu", "rnn_sigmoid")  # cells that differ from another in one function
WALKS = [
    (name, Case(cell, T=4, B=11, I=3, H=29, layout=layout, reverse=reverse))  # two tiles of rows
    for name in FORMS
    for cell in COMPILED
    if cell not in FEW or name == "joined"
    for layout, reverse in LAYOUTS
]
SIZES = [{"T": 1, "B": 1, "H": 32}, {"T": 3, "B": 17, "H": 1}, {"T": 2, "B": 8, "H": 25, "bias": False}, {"T": 12, "B": 2, "H": 32, "scale": 8.0}]  # fmt: skip
WALKS += [
    (name, Case(c, I=3, **size))
    for name in FORMS
    for c in ("lstm", "gru_reset_before")
    for size in SIZES
    if name != "cluster" or size["H"] > 24  # every block of a cluster has units
]


@pytest.fixture(scope="module")
def compiled():
    """The kernels of all walks, as many at a time as there are cores."""
    calls = {(name, case.cell, which) for name, case in WALKS for which in ("forward", "backward")}
    Twin().compile(form(name)(CELLS[cell], "fp32", 32, 1, which, True).variant for name, cell, which in sorted(calls))


@pytest.mark.slow
@pytest.mark.parametrize("name, case", WALKS, ids=str)
def test_walks(name, case, compiled, on_twin, monkeypatch):
    force(monkeypatch, form(name))
    check(case)
    assert {type(variant) for variant, _ in on_twin.launches} == {Forward, Backward}


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_several_teams(name, on_twin, monkeypatch):
    """Tiles of rows go to teams in turn: three teams for four tiles."""
    on_twin.multiprocessors = 32
    force(monkeypatch, form(name, teams=3))
    check(Case("lstm", T=3, B=29, I=3, H=29, layout="lengths"))


NUMBERS = [("cluster", "lstm", torch.bfloat16), ("grid", "lstm", torch.float16), ("joined", "gru_reset_before", torch.bfloat16)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name, cell, dtype", NUMBERS, ids=str)
def test_16_bits(name, cell, dtype, on_twin, monkeypatch):
    force(monkeypatch, form(name))
    for layout, H in (("dense", 32), ("lengths", 29)):
        check(Case(cell, T=4, B=9, I=3, H=H, layout=layout), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("name, cell", [("cluster", "gru_reset_before"), ("joined", "lstm")])
def test_tf32(name, cell, on_twin, monkeypatch):
    """As good as float16, which has as long a mantissa, and worse than float32."""
    force(monkeypatch, form(name))
    case = Case(cell, T=4, B=9, I=3, H=29)
    with place.tf32(True):
        check(case, as_good_as=torch.float16)
        assert {variant.number for variant, _ in on_twin.launches} == {"tf32"}
        with pytest.raises(AssertionError, match="off by"):
            check(case)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_the_same_bits_in_every_run_and_without_norms(name, on_twin, monkeypatch):
    force(monkeypatch, form(name))
    case = Case("lstm", T=3, B=11, I=3, H=29, layout="packed")
    same_bits(case, on_twin)


def same_bits(case, machine):
    values = case.tensors(torch.float32, requires_grad=False)
    first, cotangent = run(case, values, "cuda")
    machine.schedule = Schedule("random", 3)
    again, _ = run(case, values, "cuda", cotangent)
    plain, _ = run(case, values, "cuda", cotangent, probed=False)
    assert [k for k in first if not torch.equal(first[k], again[k])] == []
    assert [k for k in plain if not torch.equal(first[k], plain[k])] == []


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=str)
def test_as_planned(capability, on_twin):
    """By the planner's own choice, on a GPU without clusters and on one with them; the kernels run that it tells of."""
    on_twin.capability = capability
    case = Case("lstm", T=3, B=9, I=3, H=33, layout="lengths")
    check(case)
    forms = {type(variant): variant for variant, _ in on_twin.launches}
    assert set(forms) == {Forward, Backward}
    told = cuda.explain(CELLS["lstm"], 33, 9, torch.float32, "cpu")
    assert told.startswith(f"lstm, 33 units, 9 rows, fp32 on twin (sm_{capability[0]}{capability[1]},")
    for which, variant in (("forward", forms[Forward]), ("backward", forms[Backward])):
        assert f"{which}: {variant.exchange}: " in told and f"each of {variant.threads} threads" in told


# ---------------------------------------------------------------- step by step

STEPWISE = [
    Case(cell, T=4, B=5, I=3, H=H, layout=layout, reverse=reverse)
    for cell in COMPILED
    for layout in ("dense", "packed", "lengths")
    for reverse in (False, True)
    for H in (7, 12)  # one unit a thread, and four
]
STEPWISE += [Case(cell, T=1, B=1, I=1, H=1) for cell in COMPILED]
STEPWISE += [
    Case(cell, T=4, B=4, I=3, H=H, R=R, layout=layout, reverse=reverse)
    for cell, H, R in (("lstm", 12, 8), ("lstm", 7, 3), ("rnn_tanh", 12, 3))
    for layout in ("dense", "packed", "lengths")
    for reverse in (False, True)
]
STEPWISE += [Case("lstm", T=3, B=90, I=3, H=7)]  # several blocks
STEPWISE += [Case("gru", gates=True, bias=False, H=12), Case("gru_reset_before", T=12, scale=8.0)]


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_step_by_step(case, stepwise):
    check(case)
    assert {type(variant) for variant, _ in stepwise.launches} == {step.StepForward, step.StepBackward}


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("case", [Case("lstm", H=12, R=4, layout="lengths"), Case("gru_reset_before", H=12)], ids=str)
def test_step_by_step_in_16_bits(case, dtype, stepwise):
    check(case, dtype)


def test_memory_that_is_not_aligned(stepwise):
    """Rows of four units that begin between two of four."""
    case = Case("lstm", H=12, gates=True)
    values = case.tensors(torch.float32, requires_grad=False)
    shifted = {k: torch.cat([v.new_zeros(1), v.flatten()])[1:].view(v.shape) for k, v in values.items()}
    assert all(v.is_contiguous() and v.data_ptr() % 16 == 4 for v in shifted.values())
    leaves = [v.detach() for v in shifted.values()]
    with torch.no_grad():
        assert_close_to_truth(
            case.call("cuda")(*leaves), case.loop()(*leaves), case.loop()(*(v.double() for v in leaves))
        )
    assert {variant.V for variant, _ in stepwise.launches} == {1}


def test_step_by_step_has_the_same_bits_in_every_run_and_without_norms(stepwise):
    same_bits(Case("lstm", T=3, B=90, I=3, H=7, R=3, layout="lengths"), stepwise)


def test_packed_steps_launch_their_rows_only(stepwise):
    case = Case("lstm", T=40, B=40, I=1, H=64, layout="packed")
    with torch.no_grad():
        case.call("cuda")(*case.tensors(torch.float32, requires_grad=False).values())
    blocks = [n for _, n in stepwise.launches]
    assert blocks == sorted(blocks, reverse=True) and blocks[0] > blocks[-1]


# ---------------------------------------------------------------- what the host and the kernels agree on

STRUCTURES = [v for v in vars(arguments).values() if isinstance(v, type) and issubclass(v, ctypes.Structure)]


def test_structures_are_laid_out_as_the_kernels_have_them(tmp_path):
    says = [f"static_assert(gk::max_states == {arguments.MAX_STATES});"]
    says += [f"static_assert(gk::max_masks == {arguments.MAX_MASKS});"]
    says += [f"static_assert(gk::{s.name} == {s.value});" for s in (*arguments.Stage, *arguments.MaskKind)]
    for structure in STRUCTURES:
        name = structure.__name__
        says.append(f"static_assert(sizeof(gk::{name}) == {ctypes.sizeof(structure)});")
        for field, _ in structure._fields_:
            place = getattr(structure, field)
            says.append(f"static_assert(offsetof(gk::{name}, {field}) == {place.offset});")
            says.append(f"static_assert(sizeof(gk::{name}::{field}) == {place.size});")
    source = tmp_path / "structures.cpp"
    source.write_text("\n".join(['#include "arguments.cuh"', "#include <cstddef>", *says, ""]))
    line = [*COMPILER, *FLAGS, "-fsyntax-only", f"-I{KERNELS}", f"-I{HERE}", str(source)]
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_every_structure_has_its_twin():
    text = (KERNELS / "arguments.cuh").read_text()
    assert {s.__name__ for s in STRUCTURES} == set(re.findall(r"^struct (\w+) {", text, re.MULTILINE))


# ---------------------------------------------------------------- what runs where, and what is said


def test_nothing_to_walk(stepwise):
    for size in ({"T": 3, "B": 0}, {"T": 0, "B": 3}):
        check(Case("lstm", H=12, **size))
    assert stepwise.launches == []


def test_cells_of_others_run_too(stepwise):
    @cell
    def minimal_gated_unit(x, r, s):
        f = sigmoid(x[0] + r[0])  # noqa: F821 - the language of cells
        n = tanh(x[1] + r[1](f * s[0]))  # noqa: F821
        return s[0] + f * (n - s[0])

    x, w, h = torch.randn(3, 4, 24), torch.randn(24, 12) / 12**0.5, torch.randn(4, 12)
    ours, (final,) = gk.ops.recurrent(x, w, [h], cell=minimal_gated_unit, backend="cuda")
    truth, _ = gk.ops.recurrent(x.double(), w.double(), [h.double()], cell=minimal_gated_unit, backend="reference")
    theirs, _ = gk.ops.recurrent(x, w, [h], cell=minimal_gated_unit, backend="reference")
    assert_close_to_truth(ours, theirs, truth)
    assert torch.equal(final, ours[-1])


def test_reasons():
    assert "float64" in cuda.why_not(dtype=torch.float64)
    assert "not on cpu" in cuda.why_not(device=torch.device("cpu"))
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run lstm in torch.float32 on cpu"):
        Case("lstm").call("cuda")(*Case("lstm").tensors(torch.float32).values())


def test_an_error_names_the_plan(on_twin, monkeypatch):
    on_twin.shared_bytes = 1000
    force(monkeypatch, form("cluster"))
    with pytest.raises(RuntimeError, match="(?s)bytes of shared memory.*The plan was: cluster was asked for"):
        Case("lstm").call("cuda")(*Case("lstm").tensors(torch.float32).values())
