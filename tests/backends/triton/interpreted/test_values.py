"""Values and gradients of the kernels, by name, against the recurrence written out in float64."""

import pytest
import torch

import gradkernels as gk
from gradkernels.backends import reference, triton
from gradkernels.cells import CELLS
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, Case, cotangents, gradients

LAYOUTS = ("dense", "packed", "lengths")
CASES = [
    Case(cell, T=4, B=3, I=2, H=5, layout=layout, reverse=reverse)
    for cell in GATES
    for layout in LAYOUTS
    for reverse in (False, True)
]
# a projection; no bias; gates given; one of everything; more rows and units than a tile, and a contraction of several chunks
CASES += [Case("lstm", T=3, B=3, I=2, H=5, R=3, layout=layout, reverse=layout != "packed") for layout in LAYOUTS]
CASES += [Case("lstm", T=2, B=2, I=2, H=3, R=17, bias=False), Case("gru", T=1, B=1, I=1, H=1, bias=False)]
CASES += [Case("gru_reset_before", T=2, B=17, H=16, gates=True, layout="packed", reverse=True)]
CASES += [Case("lstm", T=3, B=19, I=3, H=33, layout="lengths"), Case("gru", T=2, B=33, I=3, H=70, layout="lengths")]
ROUNDED = [Case(cell, T=3, B=4, I=3, H=17, layout=a) for cell, a in zip(GATES, 2 * LAYOUTS)]
ROUNDED += [Case("lstm", T=3, B=2, I=3, H=17, R=9, layout="lengths", reverse=True), Case("gru", T=3, H=6, scale=20)]


def compare(case, dtype):
    """The kernels, and in the same dtype the reference, both against the loop in float64."""
    truth_tensors, given = case.tensors(), case.tensors(dtype)
    out, _ = gradients(case.loop(), truth_tensors, cotangents(case.loop()(*truth_tensors.values())))
    weights = cotangents(out)
    rounded = {k: v.detach().double().requires_grad_() for k, v in given.items()}
    truth = gradients(case.loop(), rounded, weights)
    ours = gradients(case.call("triton"), given, weights)
    assert gk.backends.last() == "triton"
    theirs = gradients(case.call("reference"), given, weights)
    assert_close_to_truth(tuple(ours[0]), tuple(theirs[0]), tuple(truth[0]), name="out")
    assert_close_to_truth(ours[1], theirs[1], truth[1], name="gradient of ")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float64(case, kind):
    compare(case, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("case", ROUNDED, ids=str)
def test_rounded(case, dtype, kind):
    compare(case, dtype)


@pytest.mark.parametrize("cell, layout", list(zip(GATES, 2 * LAYOUTS)))
def test_gradcheck(cell, layout, kind):
    case = Case(cell, T=2, B=2, I=1, H=2, layout=layout, reverse=layout == "packed")
    assert torch.autograd.gradcheck(case.call("triton"), tuple(case.tensors().values()), fast_mode=True)


def arguments(case):
    """What a backend is given for a case: forward, and backward without the gradients."""
    t, cell = case.tensors(requires_grad=False), CELLS[case.cell]
    weights = [t.get(k) for k in ("weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr")]
    state = [t[k] for k in case.names if k.startswith("state")]
    how = [case.batch_sizes if case.layout == "packed" else None, case.lengths if case.layout == "lengths" else None]
    return cell, t["x"], *weights, state, *how, case.reverse


@pytest.mark.parametrize("case", [c for c in CASES if c.B == 3], ids=str)
def test_parts_and_norms(case, kind):
    """What backward hands out without weight gradients, and the norms of the states' adjoints; of dense input with gradients
    of some results only."""
    cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *how = arguments(case)
    found = {}
    for module in (reference, triton):
        out = module.forward(cell, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *how, 2)
        S = cell.S
        saved, grads = [*out[:S], *out[2 * S :]], [torch.cos(v) for v in out[: 2 * S]]
        if case.layout == "dense":
            grads[0 if case.reverse else S] = None
            grads[S - 1] = None
        parts = module.backward(cell, grads, x, w_ih, w_hh, w_hr, saved, state, *how, [True] * 6, True, True)
        found[module] = saved, parts
    assert_close_to_truth(found[triton], found[reference], found[reference])


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_tokens_that_no_step_visits_are_not_read(cell, kind):
    """NaN there stays there: outputs are zero, and so are gradients."""
    case = Case(cell, T=4, B=3, I=2, H=5, layout="lengths", reverse=True)
    t = case.tensors()
    beyond = torch.arange(case.T).unsqueeze(1) >= case.lengths
    with torch.no_grad():
        t["x"][beyond] = torch.nan
    out = case.call("triton")(*t.values())
    assert not out[0].isnan().any() and (out[0][beyond] == 0).all()
    (dx,) = torch.autograd.grad(out[0].sum(), t["x"])
    assert not dx.isnan().any() and (dx[beyond] == 0).all()


def test_a_row_that_is_nan_leaves_the_others_alone(kind):
    case = Case("gru", T=3, B=4, I=2, H=5)
    t = case.tensors(requires_grad=False)
    clean = case.call("triton")(*t.values())
    t["state[0]"][2] = torch.nan
    y, final = case.call("triton")(*t.values())
    rest = [0, 1, 3]
    assert y[:, 2].isnan().all() and final[2].isnan().all()
    assert torch.equal(y[:, rest], clean[0][:, rest]) and torch.equal(final[rest], clean[1][rest])


def test_only_the_outputs(kind):
    """Without a gradient to come nothing is kept, and only the first sequence is made."""
    case = Case("lstm", T=3, B=2, I=2, H=5, R=3)
    given = arguments(case)
    ours, theirs = (module.forward(*given, 0) for module in (triton, reference))
    assert_close_to_truth(ours, theirs, theirs)
