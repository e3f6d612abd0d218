# ruff: noqa: F821 - functions of the cell language need no import
"""What is derived from a cell's forward, against torch.autograd in float64."""

import pytest
import torch

from gradkernels.cells import CELLS, cell

ROWS, H = 7, 6


class Step:
    """One step of a cell as a driver makes it, on random values, in torch operations."""

    def __init__(self, cell):
        self.cell, Q = cell, len(cell.second)
        new = lambda n: [torch.randn(ROWS, H, dtype=torch.double, requires_grad=True) for _ in range(n)]
        self.sizes = [cell.G, (cell.G - Q) * cell.recurrent, cell.S, cell.P, cell.D]  # of what has derivatives
        self.m = [torch.randint(2, (ROWS, H)).double() for _ in range(cell.M)]
        self.weights = [torch.randn(H, H, dtype=torch.double) for _ in range(Q)]
        self.inputs = [v for n in self.sizes for v in new(n)]
        self.t, self.a = self.forward(*self.inputs)[:2]

    def cut(self, values):
        values = list(values)
        return [[values.pop(0) for _ in range(n)] for n in self.sizes]

    def groups(self, values):
        """x, r, s and what else the cell takes."""
        x, r, s, p, d = self.cut(values)
        extra = {"p": p, "m": self.m, "d": d}
        return [x, r, s, *(extra[name] for name in self.cell.extra)]

    def forward(self, *values):
        x, r, *rest = self.groups(values)
        v = self.cell.operand(x, r, *rest) if self.cell.second else None
        return *self.cell.forward(x, [*r, *(v @ w for w in self.weights)], *rest), v

    def backward(self, dt):
        """-> gradients of the inputs, total, v"""
        _, _, s, *extra = self.groups(self.inputs)
        after = [self.a, s, self.t, *extra, dt]
        if not self.cell.second:
            dx, dr, *rest, total = self.cell.backward(*after)
            return [*dx, *(dr if self.cell.recurrent else []), *(d for group in rest for d in group)], total, None
        v, late = self.cell.second_adjoint(*after)
        dv = sum(d @ w.t() for d, w in zip(late, self.weights, strict=True))
        dx, dr, *rest, total = self.cell.backward(*after, dv)
        for k, d in zip(self.cell.second, late, strict=True):
            torch.testing.assert_close(dr[k], d, rtol=0, atol=0)
        return [*dx, *dr[: self.sizes[1]], *(d for group in rest for d in group)], total, v

    def tangent(self, moving):
        x, r, *rest = self.groups(self.inputs)
        dx, dr, ds, dp, dd = self.cut(moving)
        drest = [ds, *[dp] * bool(dp), *[dd] * bool(dd)]
        if self.cell.second:
            v, dv = self.cell.operand_tangent(x, r, *rest, dx, dr, *drest)
            r, dr = [*r, *(v @ w for w in self.weights)], [*dr, *(dv @ w for w in self.weights)]
        return self.cell.tangent(x, r, *rest, dx, dr, *drest)


def same(got, want):
    """Equal to rounding, measured by the largest value."""
    assert len(got) == len(want)
    for g, w in zip(got, want):
        assert g.shape == w.shape and g.dtype == w.dtype
        assert (g - w).abs().max() <= 1e-13 * w.abs().max()


def gradients(outputs, inputs, dt):
    """torch's, of the outputs that depend on anything."""
    live = [(u, d) for u, d in zip(outputs, dt, strict=True) if u.requires_grad]
    return torch.autograd.grad(
        [u for u, _ in live], inputs, [d for _, d in live], allow_unused=True, materialize_grads=True, retain_graph=True
    )


def test_backward(each):
    step = Step(each)
    dt = [torch.randn_like(u) for u in step.t]
    got, _, v = step.backward(dt)
    same(got, gradients(step.t, step.inputs, dt))
    if each.second:
        same([v], [step.forward(*step.inputs)[2]])


def test_total_adjoints_are_what_retain_grad_shows(each):
    step = Step(each)
    dt = [torch.randn_like(u) for u in step.t]
    _, total, _ = step.backward(dt)
    assert len(total) == each.S
    states = [(k, u) for k, u in enumerate(step.t) if u.requires_grad]
    same([total[k] for k, _ in states], gradients(step.t, [u for _, u in states], dt))


def test_tangent(each):
    step = Step(each)
    moving = [torch.randn_like(u) for u in step.inputs]
    t, dt = step.tangent(moving)
    want_t, want_dt = torch.func.jvp(lambda *v: step.forward(*v)[0], tuple(step.inputs), tuple(moving))
    same(t, want_t)
    same(dt, want_dt)


def test_kept_values_are_kept(each):
    step = Step(each)
    assert len(step.a) == each.A and len(step.t) == each.S
    assert all(u.shape == (ROWS, H) for u in (*step.a, *step.t))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_every_result_has_the_dtype_of_the_arguments(each, dtype, default):
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        new = lambda n: [torch.randn(2, 3, dtype=dtype) for _ in range(n)]
        x, r, s, dt = new(each.G), new(each.G), new(each.S), new(each.S)
        extra = [new(getattr(each, name.upper())) for name in each.extra]
        moving = [v for name, v in zip(each.extra, extra) if name != "m"]
        t, a = each.forward(x, r, s, *extra)
        results = [*t, *a, *each.tangent(x, r, s, *extra, x, r, s, *moving)[1]]
        for group in each.backward(a, s, t, *extra, dt, *(new(1) if each.second else [])):
            results += group
        assert {u.dtype for u in results} == {dtype}
    finally:
        torch.set_default_dtype(before)


def relu_(x, r, s):
    return relu(x[0] + r[0] + s[0])


def abs_(x, r, s):
    return abs(x[0] + r[0] + s[0])


def min_(x, r, s):
    return min(x[0], r[0]) + s[0]


def max_(x, r, s):
    return max(x[0], r[0]) + s[0]


def clamp_(x, r, s):
    return clamp(x[0] + s[0], -1, 1) + r[0]


@pytest.mark.parametrize("function", [relu_, abs_, min_, max_, clamp_], ids=lambda f: f.__name__[:-1])
def test_kinks_and_nan_as_in_torch(function):
    points = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, float("inf"), -float("inf"), float("nan")], dtype=torch.double)
    if function is clamp_:
        points = points[:-1]  # torch stops the gradient of a NaN here, and only here
    x, r = (v.flatten().requires_grad_() for v in torch.meshgrid(points, points, indexing="ij"))
    s = torch.zeros_like(x)
    torch_functions = {
        "relu": torch.relu,
        "abs": torch.abs,
        "min": torch.minimum,
        "max": torch.maximum,
        "clamp": torch.clamp,
    }
    function_of_torch = type(function)(function.__code__, torch_functions)
    want_t = function_of_torch([x], [r], [s])
    want = torch.autograd.grad(want_t.sum(), [x, r], allow_unused=True, materialize_grads=True)
    c = cell(function)
    t, a = c.forward([x], [r], [s])
    (dx,), (dr,), *_ = c.backward(a, [s], t, [torch.ones_like(x)])
    torch.testing.assert_close(t[0], want_t, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close([dx, dr], list(want), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "name, module",
    [
        ("lstm", torch.nn.LSTMCell),
        ("gru", torch.nn.GRUCell),
        ("rnn_tanh", torch.nn.RNNCell),
        ("rnn_relu", lambda *a, **k: torch.nn.RNNCell(*a, nonlinearity="relu", **k)),
    ],
)
def test_registered_cells_are_torchs(name, module):
    c, twin = CELLS[name], module(5, H, dtype=torch.double)
    u, s = torch.randn(ROWS, 5, dtype=torch.double), [torch.randn(ROWS, H, dtype=torch.double) for _ in range(c.S)]
    gates = lambda v, w, b: torch.nn.functional.linear(v, w, b).chunk(c.G, 1)
    t, _ = c.forward(gates(u, twin.weight_ih, twin.bias_ih), gates(s[0], twin.weight_hh, twin.bias_hh), s)
    want = twin(u, tuple(s) if c.S > 1 else s[0])
    same(t, want if c.S > 1 else [want])


def test_reset_before_is_equation_8_of_cho_et_al():
    x, w, h = [torch.randn(ROWS, H) for _ in range(3)], [torch.randn(H, H) for _ in range(3)], torch.randn(ROWS, H)
    x, w, h = [v.double() for v in x], [v.double() for v in w], h.double()
    r, z = torch.sigmoid(x[0] + h @ w[0].t()), torch.sigmoid(x[1] + h @ w[1].t())
    want = z * h + (1 - z) * torch.tanh(x[2] + (r * h) @ w[2].t())
    c = CELLS["gru_reset_before"]
    assert c.second == (2,)
    early = [h @ w[0].t(), h @ w[1].t()]
    v = c.operand(x, early, [h])
    same(c.forward(x, [*early, v @ w[2].t()], [h])[0], [want])


def test_sigmoid_rnn_is_a_formula_in_torch():
    x, r, h = (torch.randn(ROWS, H, dtype=torch.double) for _ in range(3))
    same(CELLS["rnn_sigmoid"].forward([x], [r], [h])[0], [1 / (1 + torch.exp(-x - r))])
