"""Cells with parameters, masks, delayed states, means or no recurrent product, and clipping, on a GPU made of fibers: against
the reference, with the same masks bit for bit."""

import itertools

import pytest
import torch

from gradkernels.backends import cuda, reference
from gradkernels.backends._extra import DRAWN, FIXED, GIVEN, Extra
from gradkernels.backends.cuda import plan, step
from gradkernels.backends.cuda.backward import Backward
from gradkernels.backends.cuda.forward import Forward
from gradkernels.cells import CELLS, cell
from gradkernels.cells.transform import masked, resets, skip, zoneout
from tests import place
from tests.backends.cuda.test_contract import force, form
from tests.close import assert_close_to_truth
from tests.cuda_on_cpu.machine import Schedule, Twin, twin  # noqa: F401 - a fixture
from tests.ops.case import GATES


@cell
def normed_reset(x, r, s):
    """Means in all of its functions, and a second product."""
    z = sigmoid(x[0] + r[0])  # noqa: F821 - the language of cells
    v = z * s[0]
    n = tanh(x[1] + r[1](v - mean(v)))  # noqa: F821
    return s[0] + z * (n - mean(n * z) - s[0])  # noqa: F821


MORE = [c for name, c in CELLS.items() if name not in GATES]
AROUND = [zoneout(CELLS["lstm"]), masked(CELLS["gru_reset_before"]), resets(CELLS["lstm"]), skip(CELLS["gru"])]
AROUND += [skip(zoneout(CELLS["rnn_tanh"])), zoneout(CELLS["indrnn"]), zoneout(CELLS["gru_layer_norm"]), normed_reset]
LAYOUTS = [(layout, reverse) for layout in ("dense", "packed", "lengths") for reverse in (False, True)]
CASES = [(c, *LAYOUTS[k % 6], (12, 7)[k % 2]) for k, c in enumerate((*MORE, *AROUND))]
CASES += [(c, layout, reverse, 4) for c in (AROUND[4], AROUND[5]) for layout, reverse in LAYOUTS]


def make(cell, layout, reverse, H, T=5, B=3, dtype=torch.float32, drawn=True):
    """(arguments of forward before `keep`, extra)"""
    g = torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    lengths = torch.linspace(T, 1 if layout == "packed" else 0, B).round().long()
    batch_sizes = (torch.arange(T).unsqueeze(1) < lengths).sum(1) if layout == "packed" else None
    lead = (int(batch_sizes.sum()),) if layout == "packed" else (T, B)
    N, R = lead[0] if layout == "packed" else T * B, H if cell.recurrent else 0
    w, b = new(cell.G * H, R) / H**0.5, new(cell.G * H) if cell.recurrent else None
    state = [new(B, H) for _ in range(cell.S)]
    kinds = itertools.cycle([(0.4, 1.0, DRAWN), (0.3, 1 / 0.7, FIXED), (0.5, 2.0, DRAWN)])
    noise = [next(kinds) for _ in range(cell.M)]
    flagged = cell.name.startswith("resets")
    if flagged:
        noise[-1] = (0.0, 1.0, GIVEN)
    extra = Extra(
        params=new(cell.P, H) if cell.P else None,
        seed=torch.tensor([-(2**60) - 12345]) if drawn and cell.M else None,
        noise=tuple(v for plane in noise for v in plane),
        flags=(torch.rand(N, generator=g) < 0.7).to(dtype) if flagged else None,
        skip=2 if cell.D else 0,
        clip=0.3,
        first=7,
    )
    given = [new(*lead, cell.G * H), None, None, w, b, None, state, batch_sizes]
    return [cell, *given, lengths.roll(1) if layout == "lengths" else None, reverse], extra


def run(module, given, extra):
    """Saved values, then parts of the gradients, gradients of the states, norms."""
    cell, x, w_ih, _, w, _, w_hr, state, *how = given
    out = module.forward(*given, 2, extra)
    saved = [*out[: cell.S], *out[2 * cell.S :]]
    grads = [torch.cos(v) for v in out[: 2 * cell.S]]
    need = [True, False, False, cell.recurrent, False, False, cell.P > 0]
    parts = module.backward(cell, grads, x, w_ih, w, w_hr, saved, state, *how, need, True, True, extra)
    whole = module.backward(cell, grads, x, w_ih, w, w_hr, saved, state, *how, need, False, False, extra)
    return [v.to(x.dtype) for v in (*out, *parts, *whole)]


def check(given, extra):
    """As good as the reference that rounds after every operation."""
    wide = lambda v: (
        [wide(u) for u in v]
        if isinstance(v, list)
        else v.double()
        if torch.is_tensor(v) and v.is_floating_point()
        else v
    )
    more = extra._replace(params=wide(extra.params), flags=wide(extra.flags))
    truth = run(reference, wide(given), more)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "precise", lambda v: v)
        theirs = run(reference, given, extra)
    with place.tf32(False):
        ours = run(cuda, given, extra)
    assert_close_to_truth(ours, theirs, truth, name=given[0].name)
    return ours


def stepwise(*_):
    return plan.Plan("step", None, 0, 0, "it was asked for", (), 0.0)


@pytest.fixture(scope="module")
def compiled():
    """The kernels of all cases, as many at a time as there are cores."""
    kinds = (step.StepForward, step.StepBackward)
    cells = {(c, step.most_units(c) if H % 4 == 0 else 1) for c, _, _, H in CASES}
    Twin().compile(kind(c, "fp32", V) for c, V in cells for kind in kinds)


@pytest.mark.parametrize("cell, layout, reverse, H", CASES, ids=lambda v: getattr(v, "name", str(v)))
def test_against_the_reference(cell, layout, reverse, H, compiled, twin, monkeypatch):  # noqa: F811
    force(monkeypatch, stepwise)
    check(*make(cell, layout, reverse, H))
    if not cell.recurrent:
        assert len(twin.launches) == 3  # all steps in one


WALKS = [
    ("cluster", zoneout(CELLS["lstm_peephole"]), "lengths", False, torch.float32),
    ("cluster", CELLS["lstm"], "packed", True, torch.bfloat16),  # clipped
    ("grid", AROUND[2], "packed", False, torch.float32),
    ("joined", AROUND[1], "lengths", True, torch.float32),
]


@pytest.mark.slow
@pytest.mark.parametrize("name, cell, layout, reverse, dtype", WALKS, ids=lambda v: getattr(v, "name", str(v)))
def test_kernels_that_walk_the_sequence(name, cell, layout, reverse, dtype, twin, monkeypatch):  # noqa: F811
    force(monkeypatch, form(name))
    given, extra = make(cell, layout, reverse, H=29, T=4, B=11, dtype=dtype)
    check(given, extra)
    assert {type(variant) for variant, _ in twin.launches} == {Forward, Backward}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "cell, H", [(CELLS["lstm_layer_norm"], 9), (AROUND[4], 12)], ids=lambda v: getattr(v, "name", "")
)
def test_16_bits(cell, H, dtype, twin):  # noqa: F811
    check(*make(cell, "lengths", False, H, dtype=dtype))


def test_more_units_than_threads(twin):  # noqa: F811
    """A thread has several units of a row that means are taken over; the same bits whoever comes first."""
    given, extra = make(CELLS["gru_layer_norm"], "lengths", False, H=300, T=2, B=2)
    first = check(given, extra)
    twin.schedule = Schedule("random", 3)
    again = run(cuda, given, extra)
    assert [k for k, (a, b) in enumerate(zip(first, again)) if not torch.equal(a, b)] == []


def test_masks_without_a_seed_are_their_means(twin):  # noqa: F811
    check(*make(AROUND[0], "dense", False, H=12, drawn=False))


def test_clipping_of_a_projection(twin):  # noqa: F811
    given, extra = make(CELLS["lstm"], "lengths", True, H=12)
    w = torch.randn(4, 12, generator=torch.Generator().manual_seed(1))
    given[4], given[6], given[7] = given[4][:, :4].contiguous(), w, [given[7][0][:, :4].contiguous(), given[7][1]]
    check(given, extra)


def test_what_is_said(twin):  # noqa: F811
    """The plan says which part of a cell sends it step by step; what no kernel has is refused."""
    for c, said in (
        (CELLS["lstm_layer_norm"], "means"),
        (AROUND[4], "delayed"),
        (CELLS["indrnn"], "no rec"),
    ):
        assert said in plan.plan(twin, c, "bf16", 64, 8, "forward").why
    many = zoneout(zoneout(zoneout(CELLS["slstm"])))
    assert "12 masks, and the kernels take 8" in cuda.why_not(many)
