"""The two operators by themselves, as traced and exported graphs call them."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, vmap
from torch.library import opcheck

import gradkernels as gk
from gradkernels.backends import last
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, NAMES, Case

FORWARD = torch.ops.gradkernels.recurrent_forward.default
BACKWARD = torch.ops.gradkernels.recurrent_backward.default
CASES = [
    Case("lstm"),
    Case("lstm", R=3, reverse=True),
    Case("gru", layout="lengths"),
    Case("gru_reset_before", bias=False),
]
CASES += [
    Case("lstm", layout="packed"),
    Case("rnn_tanh", gates=True),
    Case("gru_reset_before", layout="packed", reverse=True),
]
every = pytest.mark.parametrize("case", CASES, ids=str)


def forward_args(case, t, keep, backend):
    steps = case.batch_sizes if case.layout == "packed" else None, case.lengths if case.layout == "lengths" else None
    state = [t[k] for k in case.names if k.startswith("state")]
    return case.cell, *(t.get(k) for k in NAMES), state, *steps, case.reverse, keep, backend


def backward_args(case, t, backend, gates=False, norms=True, requires_grad=False):
    args = forward_args(case, t, 2, backend)
    _, x, w_ih, _, w_hh, b_hh, w_hr, state, *steps = args[:10]
    with torch.no_grad():
        out = FORWARD(*args)
    S = len(state)
    saved, final = [v.detach() for v in (*out[:S], *out[2 * S :])], torch.randn_like(state[-1])
    grads = [torch.randn_like(out[0]), *[None] * (2 * S - 2), final]
    for v in (*saved, grads[0]) if requires_grad else ():
        v.requires_grad_()
    need = [True, w_ih is not None, w_ih is not None, True, b_hh is not None, w_hr is not None]
    return [case.cell, grads, x, w_ih, w_hh, w_hr, saved, state, *steps, case.reverse, need, gates, norms, backend]


def checks(untraceable):
    """What opcheck tries: all of it, but where a derivative reads `lengths` or `batch_sizes` no tracer can follow."""
    every = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    return every[: 3 if untraceable else 4]


SMALL = [replace(case, T=2, B=2, I=3, H=3, R=2 if case.R else 0) for case in CASES]  # a tracer follows every step
checked = pytest.mark.parametrize("case", SMALL, ids=str)


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no grad", "grad"))
@pytest.mark.parametrize("keep", (0, 1, 2))
@checked
def test_opcheck_forward(case, keep, requires_grad, backend):
    args = forward_args(case, case.tensors(torch.float32, requires_grad), keep, backend)
    # with lengths, what is kept of rows that have ended is unspecified: two runs cannot be compared
    opcheck(
        FORWARD,
        args,
        test_utils=checks(keep == 2 and (case.layout == "lengths" or (requires_grad and case.layout == "packed"))),
    )


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no grad", "grad"))
@pytest.mark.parametrize("gates", (False, True), ids=("gradients", "parts"))
@checked
def test_opcheck_backward(case, gates, requires_grad, backend):
    t = case.tensors(torch.float32, requires_grad)
    args = backward_args(case, t, backend, gates, requires_grad=requires_grad)
    opcheck(BACKWARD, args, test_utils=checks(requires_grad and case.layout != "dense"))


@pytest.mark.parametrize("keep", (0, 1, 2))
@every
@pytest.mark.float64
def test_derivative_of_the_forward_operator(case, keep, backend):
    """First and second order, through every output, those kept for backward among them."""
    S = gk.cells.get(case.cell).S

    def f(call):
        t = case.tensors()
        out = call(t)
        loss = sum((k + 1) * v.square().sum() for k, v in enumerate(out))
        g = torch.autograd.grad(loss, list(t.values()), create_graph=True)
        return g, torch.autograd.grad(sum(v.square().sum() for v in g), list(t.values()))

    def loop(t):
        out = case.loop()(*t.values())
        return (out[0], *out[S:]) if keep == 0 else out

    if keep == 2:  # the reference, differentiated by autograd, says what is kept
        cell, reference = gk.cells.get(case.cell), gk.backends.load("reference").forward
        want = f(lambda t: reference(cell, *forward_args(case, t, 2, None)[1:-1]))
    else:
        want = f(loop)
    got = f(lambda t: FORWARD(*forward_args(case, t, keep, backend)))
    assert_close_to_truth(got, want, want, name=str(case))


@every
@pytest.mark.float64
def test_operators_compose(case, backend):
    """The derivative of what a traced backward graph computes: backward operator over forward operator."""

    def second(call):
        t = case.tensors()
        g = call(t)
        return torch.autograd.grad(sum((k + 1) * v.square().sum() for k, v in enumerate(g)), list(t.values()))

    def composed(t):
        args = forward_args(case, t, 2, backend)
        _, x, w_ih, b_ih, w_hh, b_hh, w_hr, state, *steps = args[:10]
        out, S = FORWARD(*args), len(state)
        need = [v is not None for v in (x, w_ih, b_ih, w_hh, b_hh, w_hr)]
        grads, saved = [2 * out[0], *[None] * (2 * S - 1)], [*out[:S], *out[2 * S :]]
        return BACKWARD(
            case.cell, grads, x, w_ih, w_hh, w_hr, saved, state, *steps, case.reverse, need, False, False, backend
        )

    def loop(t):
        return torch.autograd.grad(case.loop()(*t.values())[0].square().sum(), list(t.values()), create_graph=True)

    got, want = second(composed), second(loop)
    assert_close_to_truth(got, want, want, name=str(case))


@every
@pytest.mark.float64
def test_parts_make_up_the_gradients(case, backend):
    """gates=True gives that of which gates=False makes its products."""
    t = case.tensors(requires_grad=False)
    full = iter(BACKWARD(*backward_args(case, t, backend)))
    torch.manual_seed(0)  # the same cotangents
    whole = BACKWARD(*backward_args(case, t, backend, norms=False))
    torch.manual_seed(0)
    parts = BACKWARD(*backward_args(case, t, backend, gates=True, norms=False))
    assert len(list(full)) == len(whole) + 1
    S, c = gk.cells.get(case.cell).S, gk.cells.get(case.cell)
    n = 1 + bool(c.split) + bool(c.second) + bool(case.R)
    assert len(parts) == n + S and [v.shape[-1] for v in parts[:1]] == [t["weight_hh"].shape[0]]
    for a, b in zip(whole[-S:], parts[-S:]):
        assert_close_to_truth(a, b, b)
    dx = parts[0] if case.gates else parts[0] @ t["weight_ih"]
    assert_close_to_truth(whole[0], dx, dx)
    if case.bias and not case.gates:
        total = parts[0].flatten(0, -2).sum(0)
        assert_close_to_truth(whole[2], total, total)


@every
def test_fakes_and_meta(case, backend):
    """Shapes without numbers, from fake tensors and from the meta device; the first through the entry."""
    t = case.tensors(torch.float32, requires_grad=False)
    real = FORWARD(*forward_args(case, t, 2, backend))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = FORWARD(*forward_args(case, {k: mode.from_tensor(v) for k, v in t.items()}, 2, backend))
    meta = FORWARD(*forward_args(case, {k: v.to("meta") for k, v in t.items()}, 2, backend))
    for a, b, c in zip(real, fake, meta, strict=True):
        assert (
            a.shape == b.shape == c.shape and a.dtype == b.dtype == c.dtype and c.is_meta and a.stride() == b.stride()
        )


def test_meta_through_the_entry(backend):
    t = Case("lstm").tensors(torch.float32)
    f = Case("lstm").call(backend)
    values = [v.detach().to("meta").requires_grad_() for v in t.values()]
    out = f(*values)
    sum(o.sum() for o in out).backward()
    assert out[0].shape == (5, 3, 6) and out[0].is_meta and all(v.grad.shape == v.shape for v in values)


@every
@pytest.mark.float64
def test_vmap_over_the_operators(case, backend):
    t = case.tensors(requires_grad=False)
    X = torch.stack([t["x"], t["x"] + 1])

    def f(x):
        return FORWARD(*forward_args(case, {**t, "x": x}, 2, backend))

    S, pairs = gk.cells.get(case.cell).S, list(zip(vmap(f)(X), zip(*map(f, X))))
    # with lengths, what is kept of rows that have ended is unspecified
    for got, want in pairs[: 2 * S] if case.layout == "lengths" else pairs:
        assert_close_to_truth(got, torch.stack(want), torch.stack(want))

    def gradient(x):
        args = backward_args(case, t, backend, norms=False)
        args[2] = x
        return BACKWARD(*args)

    torch.manual_seed(0)
    got = vmap(gradient, randomness="same")(X)
    for x, *g in zip(X, *got):
        torch.manual_seed(0)
        want = vmap(gradient, randomness="same")(x.unsqueeze(0))
        assert_close_to_truth(g, [w[0] for w in want], [w[0] for w in want])


@pytest.mark.float64
def test_grad_of_the_operator_under_torch_func(backend):
    case = Case("lstm")
    t = case.tensors(requires_grad=False)
    got = grad(lambda x: FORWARD(*forward_args(case, {**t, "x": x}, 0, backend))[0].square().sum())(t["x"])
    want = grad(lambda x: case.loop()(*{**t, "x": x}.values())[0].square().sum())(t["x"])
    assert_close_to_truth(got, want, want)


@pytest.mark.float64
def test_forward_mode_of_the_operator_is_refused(backend):
    """Not silently zero; the entry does it."""
    case = Case("gru")
    t = case.tensors(requires_grad=False)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(t["x"], torch.ones_like(t["x"]))
        with pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            FORWARD(*forward_args(case, {**t, "x": x}, 0, backend))


@pytest.mark.parametrize("cell", GATES)
def test_the_backend_that_was_asked_for_ran(cell, backend):
    t = Case(cell).tensors(torch.float32, requires_grad=False)
    FORWARD(*forward_args(Case(cell), t, 0, backend))
    assert last() == backend
    for other in ("cpu", "reference"):
        if place.why_not(other, place.device) is None:
            FORWARD(*forward_args(Case(cell), t, 0, other))
            assert last() == other
