"""torch.func over the layer, against torch.func over the written-out loop, in float64."""

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, Case

CASES = [Case(cell, T=3, B=2, I=2, H=3) for cell in GATES]
CASES += [Case("lstm", T=3, B=2, I=2, H=3, R=2), Case("gru", T=3, B=2, H=3, gates=True, bias=False)]
CASES += [
    Case(cell, T=3, B=3, I=2, H=2, layout="packed", reverse=r)
    for cell, r in (("lstm", True), ("gru_reset_before", False))
]
CASES += [
    Case("lstm", T=3, B=3, I=2, H=3, R=2, layout="lengths", reverse=True),
    Case("gru", T=3, B=3, layout="lengths"),
]
every = pytest.mark.parametrize("case", CASES, ids=str)
few = pytest.mark.parametrize("case", [CASES[0], CASES[2], *CASES[6:7], CASES[10]], ids=str)


def loss(function):
    return lambda *v: sum((k + 1) * o.square().sum() for k, o in enumerate(function(*v)))


def same(case, backend, transform, *args):
    """transform(function)(*args) for both functions."""
    ours, theirs = (transform(f)(*args) for f in (case.call(backend), case.loop()))
    assert_close_to_truth(ours, theirs, theirs, name=str(case))


def setup(case, N=3):
    """tensors, their numbers, N inputs, and in_dims that map the input alone."""
    t = list(case.tensors(requires_grad=False).values())
    X = place.randn(N, *t[0].shape, dtype=torch.double)
    return t, tuple(range(len(t))), X, (0, *[None] * (len(t) - 1))


@every
@pytest.mark.float64
def test_grad_and_vjp(case, backend):
    t, n, *_ = setup(case)
    same(case, backend, lambda f: grad(loss(f), n), *t)
    same(case, backend, lambda f: lambda *v: vjp(f, *v)[1](f(*v)), *t)


@every
@pytest.mark.float64
def test_vmap(case, backend):
    t, n, X, dims = setup(case)
    same(case, backend, lambda f: vmap(f, dims), X, *t[1:])
    same(case, backend, lambda f: vmap(vmap(f, dims), dims), torch.stack([X, X + 1]), *t[1:])
    same(case, backend, lambda f: vmap(f, (1, *dims[1:]), out_dims=1), X.movedim(0, 1), *t[1:])
    same(case, backend, lambda f: grad(lambda *v: sum(o.square().sum() for o in vmap(f, dims)(*v)), n), X, *t[1:])


@every
@pytest.mark.float64
def test_per_sample_gradients_of_every_parameter(case, backend):
    t, n, X, dims = setup(case)
    same(case, backend, lambda f: vmap(grad(loss(f), n), dims), X, *t[1:])


@every
@pytest.mark.float64
def test_vmap_over_states_alone(case, backend):
    t, n, _, _ = setup(case)
    dims = tuple(0 if k.startswith("state") else None for k in case.names)
    values = [torch.stack([v, v + 1]) if d == 0 else v for v, d in zip(t, dims)]
    same(case, backend, lambda f: vmap(grad(loss(f), n), dims), *values)


@every
@pytest.mark.float64
def test_ensemble_of_weights(case, backend):
    t, n, *_ = setup(case)
    stacked = [torch.stack([v, v * 1.1]) for v in t]
    same(case, backend, lambda f: vmap(grad(loss(f), n)), *stacked)
    same(case, backend, lambda f: vmap(f), *stacked)


@every
@pytest.mark.float64
def test_forward_mode(case, backend):
    t, _, X, _ = setup(case)
    V = tuple(torch.randn_like(v) for v in t)
    same(case, backend, lambda f: lambda *v: jvp(f, v, V), *t)
    same(case, backend, lambda f: vmap(lambda x, v: jvp(lambda z: f(z, *t[1:]), (x,), (v,))), X, X + 1)
    same(case, backend, lambda f: linearize(lambda x: f(x, *t[1:]), t[0])[1], V[0])


@every
@pytest.mark.float64
def test_jacobians(case, backend):
    t, n, *_ = setup(case)
    same(case, backend, lambda f: jacrev(f, n), *t)
    same(case, backend, lambda f: jacfwd(f, n), *t)


ORDERS = {"forward over reverse": (jacfwd, jacrev), "reverse over reverse": (jacrev, jacrev)}
ORDERS |= {"reverse over forward": (jacrev, jacfwd), "forward over forward": (jacfwd, jacfwd)}


@few
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.float64
def test_hessian(case, order, backend):
    outer, inner = ORDERS[order]
    t, *_ = setup(case)
    weight = case.names.index("weight_hh")
    want = hessian(loss(case.loop()), (0, weight))(*t)
    got = outer(inner(loss(case.call(backend)), (0, weight)), (0, weight))(*t)
    assert_close_to_truth(got, want, want, name=order)


@few
@pytest.mark.float64
def test_vmap_of_hessian_and_third_order(case, backend):
    t, _, X, _ = setup(case, N=2)
    same(case, backend, lambda f: vmap(hessian(lambda x: loss(f)(x, *t[1:]))), X)

    def third(f):
        def first(w):
            return grad(lambda x: loss(f)(x, *t[1:]))(w).square().sum()

        return grad(lambda z: grad(first)(z).square().sum())

    same(case, backend, third, t[0])


@pytest.mark.float64
def test_lengths_may_be_mapped(backend):
    """Each element of the mapped dimension has its own lengths: one call each."""
    case = Case("lstm", T=4, B=3)
    t, *_ = setup(case)
    lengths = torch.tensor([[4, 1, 0], [2, 3, 4]])
    got = vmap(lambda n: case.call(backend, lengths=n)(*t))(lengths)
    want = [case.call(backend, lengths=n)(*t) for n in lengths]
    assert all(torch.equal(g, torch.stack(w)) for g, w in zip(got, zip(*want)))


@pytest.mark.float64
def test_what_a_row_hides_stays_hidden_under_vmap(backend):
    """NaN beyond a row's end meets zero gradients in the batched weight gradients."""
    case = Case("gru", T=4, B=3, layout="lengths")
    t, n, X, dims = setup(case)
    X[:, torch.arange(4).unsqueeze(1) >= case.lengths] = torch.nan
    got = vmap(grad(loss(case.call(backend)), n), dims)(X, *t[1:])
    assert all(g.isfinite().all() for g in got)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_per_sample_gradients_in_other_dtypes(dtype, backend):
    case = Case("lstm", T=6, B=2, I=5, H=17)
    t, n, X, dims = setup(case)
    low, X = [v.to(dtype) for v in t], X.to(dtype)
    high = [v.double() for v in low]
    ours = vmap(grad(loss(case.call(backend)), n), dims)(X, *low[1:])
    theirs = vmap(grad(loss(case.loop()), n), dims)(X, *low[1:])
    truth = vmap(grad(loss(case.loop()), n), dims)(X.double(), *high[1:])
    assert_close_to_truth(ours, theirs, truth)
