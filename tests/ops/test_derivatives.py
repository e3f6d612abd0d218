"""Derivatives of every order and kind, in float64 against finite differences and against the written-out loop."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, SMALL, Case, cotangents, gradients

CELLS = list(GATES)
every_small = pytest.mark.parametrize("case", SMALL, ids=str)


def loss(function):
    """A number in which every output counts differently."""
    return lambda *v: sum((k + 1) * o.square().sum() for k, o in enumerate(function(*v)))


def exact(ours, theirs):
    assert_close_to_truth(ours, theirs, theirs, name="float64")


@every_small
@pytest.mark.float64
def test_gradcheck(case, backend):
    f, t = case.call(backend), tuple(case.tensors().values())
    assert gradcheck(f, t, check_forward_ad=True, check_batched_grad=True)


@every_small
@pytest.mark.float64
def test_gradgradcheck(case, backend):
    f, t = case.call(backend), tuple(case.tensors().values())
    assert gradgradcheck(f, t, fast_mode=True, check_batched_grad=True)
    assert gradgradcheck(
        f, t, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=False, check_undefined_grad=False
    )


@pytest.mark.parametrize("case", [Case(cell, T=2, B=1, I=1, H=2) for cell in CELLS], ids=str)
@pytest.mark.float64
def test_gradgradcheck_every_element(case, backend):
    assert gradgradcheck(case.call(backend), tuple(case.tensors().values()))


@every_small
@pytest.mark.float64
def test_third_order(case, backend):
    def orders(function):
        t = list(case.tensors().values())
        g = torch.autograd.grad(loss(function)(*t), t, create_graph=True)
        h = torch.autograd.grad(sum(v.square().sum() for v in g), t, create_graph=True)
        return g, h, torch.autograd.grad(sum(v.square().sum() for v in h), t)

    exact(orders(case.call(backend)), orders(case.loop()))


@every_small
@pytest.mark.float64
def test_jvp_of_jvp(case, backend):
    """torch switches forward mode off inside a Function's jvp, so that this would silently be zero."""
    t = case.tensors(requires_grad=False)
    v = {k: torch.randn_like(u) for k, u in t.items()}

    def twice(function):
        def once(*values):
            return torch.func.jvp(function, values, tuple(v.values()))[1]

        return torch.func.jvp(once, tuple(t.values()), tuple(v.values()))

    exact(twice(case.call(backend)), twice(case.loop()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.float64
def test_dual_tensors(cell, backend):
    case = Case(cell)
    t = case.tensors(requires_grad=False)
    v = {k: torch.randn_like(u) for k, u in t.items()}

    def tangents(function):
        with forward_ad.dual_level():
            out = function(*(forward_ad.make_dual(t[k], v[k]) for k in t))
            return [tuple(forward_ad.unpack_dual(o)) for o in out]

    exact(tangents(case.call(backend)), tangents(case.loop()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.float64
def test_forward_mode_over_backward_without_a_graph(cell, backend):
    """The backward runs with grad mode off and still carries tangents."""
    case = Case(cell, T=3)
    t = case.tensors(requires_grad=False)
    direction = torch.randn_like(t["x"])

    def hessian_times(function):
        with forward_ad.dual_level():
            x = forward_ad.make_dual(t["x"].clone().requires_grad_(), direction)
            g = torch.autograd.grad(loss(function)(x, *list(t.values())[1:]), x)[0]
            return tuple(forward_ad.unpack_dual(g))

    exact(hessian_times(case.call(backend)), hessian_times(case.loop()))


@every_small
@pytest.mark.float64
def test_jacobian_vectorized(case, backend):
    x, *rest = case.tensors(requires_grad=False).values()

    def f(u):
        return case.call(backend)(u, *rest)[0]

    exact(*(torch.autograd.functional.jacobian(f, x, vectorize=v) for v in (True, False)))


@pytest.mark.float64
def test_is_grads_batched_over_saved_states(backend):
    """Batched cotangents of every output, and a graph of the batched gradients themselves."""
    case = Case("lstm", T=3, B=2, H=3, R=2)
    many = [place.randn(4, *o.shape, dtype=torch.double) for o in case.call(backend)(*case.tensors().values())]

    def both(function):
        t = list(case.tensors().values())
        return torch.autograd.grad(function(*t), t, many, is_grads_batched=True)

    exact(both(case.call(backend)), both(case.loop()))


@every_small
def test_second_backward_has_the_same_bits(case, backend):
    t = list(case.tensors(torch.float32).values())
    out = loss(case.call(backend))(*t)
    a, b = torch.autograd.grad(out, t, retain_graph=True), torch.autograd.grad(out, t)
    assert all(map(torch.equal, a, b))


@pytest.mark.parametrize("case", [Case("lstm"), Case("gru_reset_before", layout="lengths")], ids=str)
def test_accumulation_into_grad(case, backend):
    t = case.tensors(torch.float32)
    out = loss(case.call(backend))(*t.values())
    out.backward(retain_graph=True)
    once = [v.grad.clone() for v in t.values()]
    out.backward()
    assert all(torch.equal(2 * g, v.grad) for g, v in zip(once, t.values()))


@pytest.mark.float64
def test_one_tensor_as_two_states(backend):
    case = Case("lstm")
    *t, h, _ = case.tensors().values()

    def orders(function):
        g = torch.autograd.grad(loss(function)(*t, h, h), [h, *t], create_graph=True)
        return g, torch.autograd.grad(sum(v.square().sum() for v in g), [h, *t])

    exact(orders(case.call(backend)), orders(case.loop()))


@pytest.mark.float64
def test_one_tensor_as_both_weights(backend):
    case = Case("rnn_tanh", I=6)
    t = case.tensors()
    values = [t["weight_hh"] if k == "weight_ih" else v for k, v in t.items()]
    exact(*(torch.autograd.grad(loss(f)(*values), t["weight_hh"]) for f in (case.call(backend), case.loop())))


SUBSETS = [
    ("x",),
    ("weight_hh",),
    ("weight_ih", "bias_hh"),
    ("bias_ih",),
    ("state[0]",),
    ("state[1]",),
    ("x", "state[1]"),
]
SUBSETS += [("weight_hr",), ("weight_hr", "state[0]", "bias_ih")]


@pytest.mark.parametrize("layout", ("dense", "packed", "lengths"))
@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
def test_only_some_tensors_need_a_gradient(wanted, layout, backend):
    """The others are frozen; each gradient is what it is when all are wanted."""
    case = Case("lstm", H=9, R=4, layout=layout)
    every = case.tensors(torch.float32)
    random = cotangents(case.call(backend)(*every.values()))
    full = gradients(case.call(backend), every, random)[1]
    frozen = {k: v.detach().requires_grad_(k in wanted) for k, v in every.items()}
    out = case.call(backend)(*frozen.values())
    got = torch.autograd.grad(out, [frozen[k] for k in wanted], [r.float() for r in random])
    assert all(torch.equal(full[k], g) for k, g in zip(wanted, got))
    out = case.call(backend)(*frozen.values())
    torch.autograd.backward(out, [r.float() for r in random])
    assert all((v.grad is not None) == (k in wanted) for k, v in frozen.items())


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("which", ("first output", "last state", "nothing but a slice"))
@pytest.mark.float64
def test_only_some_outputs_are_used(cell, which, backend):
    case = Case(cell)
    pick = {
        "first output": lambda o: o[0],
        "last state": lambda o: o[-1],
        "nothing but a slice": lambda o: o[0][2, 1:],
    }[which]
    t = list(case.tensors().values())

    def got(function):
        return torch.autograd.grad(pick(function(*t)).square().sum(), t, allow_unused=True, materialize_grads=True)

    exact(got(case.call(backend)), got(case.loop()))


@pytest.mark.parametrize("which", ("weight_hh", "x", "output"))
def test_a_change_in_place_is_caught(which, backend):
    case = Case("lstm")
    t = case.tensors(torch.float32)
    out = case.call(backend)(*t.values())
    with torch.no_grad():
        (out[0] if which == "output" else t[which]).mul_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sum(o.sum() for o in out).backward()


def test_outputs_may_be_changed_in_place_when_nothing_needs_them(backend):
    t = Case("gru").tensors(torch.float32, requires_grad=False)
    y = Case("gru").call(backend)(*t.values())[0]
    before = y.clone()
    assert torch.equal(y.mul_(2), 2 * before) and y._version > 0


def planes(run, T, B, H, parameters):
    """Storage that autograd keeps, parameters left out, in units of T*B*H float32."""
    seen, own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(v):
        if v.untyped_storage().data_ptr() not in own:
            seen[v.untyped_storage().data_ptr()] = v.untyped_storage().nbytes()
        return v

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda v: v):
        out = run()
    assert out.grad_fn is not None
    return sum(seen.values()) / (T * B * H * 4)


@pytest.mark.parametrize(("kind", "most"), [("LSTM", 7), ("GRU", 6), ("RNN", 2)])
@pytest.mark.cpu
def test_planes_kept_for_backward(kind, most, backend):
    T, B, H = 32, 8, 64
    layer, x = getattr(nn, kind)(H, H), place.randn(T, B, H, requires_grad=True)
    w_ih, w_hh, b_ih, b_hh = layer.parameters()
    cell = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    kwargs = {"weight_ih": w_ih, "bias_ih": b_ih, "bias_hh": b_hh, "cell": cell, "backend": backend}
    theirs = planes(lambda: layer(x)[0], T, B, H, layer.parameters())
    ours = planes(lambda: gk.ops.recurrent(x, w_hh, **kwargs)[0], T, B, H, layer.parameters())
    initial = gk.cells.get(cell).S / T  # the zeros
    assert ours <= most + initial
    assert ours <= theirs
    if kind == "LSTM":
        assert ours <= theirs / 2


@pytest.mark.float64
def test_saved_tensors_may_live_elsewhere(backend):
    case = Case("lstm", R=3, layout="lengths")
    t, f = list(case.tensors().values()), case.call(backend)
    there = lambda v: (v.detach().cpu().numpy().copy(), v.device)
    with torch.autograd.graph.saved_tensors_hooks(there, lambda v: torch.from_numpy(v[0]).to(v[1])):
        out = loss(f)(*t)
    assert all(map(torch.equal, torch.autograd.grad(out, t), torch.autograd.grad(loss(f)(*t), t)))


def test_saved_tensors_of_another_shape_are_refused(backend):
    """A hook is the user's code: the kernel must not trust what comes back."""
    case = Case("gru")
    t = case.tensors(torch.float32)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: v, lambda v: v[:1].clone()):
        out = loss(case.call(backend))(*t.values())
    with pytest.raises(RuntimeError, match="must have shape|must be equal|dimensions"):
        out.backward()


@pytest.mark.parametrize("reentrant", (True, False), ids=("reentrant", "not reentrant"))
@pytest.mark.parametrize("cell", ("lstm", "gru_reset_before"))
def test_checkpoint(cell, reentrant, backend):
    case = Case(cell)
    t, f = list(case.tensors(torch.float32).values()), case.call(backend)
    again = loss(lambda *v: checkpoint(f, *v, use_reentrant=reentrant))(*t)
    again.backward()
    got = [v.grad for v in t]
    assert all(map(torch.equal, got, torch.autograd.grad(loss(f)(*t), t)))
