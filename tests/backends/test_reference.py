"""The reference backend by itself: what it is made of against autograd, and how a backend is chosen."""

import pytest
import torch

import gradkernels as gk
from gradkernels import backends
from gradkernels.backends import reference
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, Case

SAMPLES = [
    Case(cell, layout=a, reverse=r) for cell in GATES for a in ("dense", "packed", "lengths") for r in (False, True)
]
SAMPLES += [Case("lstm", R=3), Case("lstm", R=3, layout="lengths", reverse=True), Case("gru", gates=True, bias=False)]
every = pytest.mark.parametrize("case", SAMPLES, ids=str)


def arguments(case, t):
    steps = case.batch_sizes if case.layout == "packed" else None, case.lengths if case.layout == "lengths" else None
    weights = (t.get(k) for k in ("x", "weight_ih", "bias_ih", "weight_hh", "bias_hh", "weight_hr"))
    return gk.cells.get(case.cell), *weights, [t[k] for k in case.names if k.startswith("state")], *steps, case.reverse


@every
def test_backward_equals_autograd_through_forward(case):
    t = case.tensors()
    args = arguments(case, t)
    S, state = len(args[7]), args[7]
    out = reference.forward(*args, 2)
    grads = [torch.randn_like(v) for v in out[: 2 * S]]
    want = torch.autograd.grad(out[: 2 * S], list(t.values()), grads)
    need = [v is not None for v in args[1:7]]
    x, w_ih, _, w_hh, _, w_hr = args[1:7]
    kept = [v.detach() for v in (*out[:S], *out[2 * S :])]
    got = reference.backward(args[0], grads, x, w_ih, w_hh, w_hr, kept, state, *args[8:], need, False, False)
    assert_close_to_truth(list(got), list(want), list(want), name=str(case))


@every
def test_a_missing_gradient_is_zero(case):
    t = case.tensors(requires_grad=False)
    args = arguments(case, t)
    S = len(args[7])
    out = reference.forward(*args, 2)
    x, w_ih, _, w_hh, _, w_hr = args[1:7]
    need = [v is not None for v in args[1:7]]

    def backward(grads):
        return reference.backward(
            args[0], grads, x, w_ih, w_hh, w_hr, out[:S] + out[2 * S :], args[7], *args[8:], need, False, True
        )

    some = [torch.randn_like(out[0])] + [None] * (2 * S - 1)
    assert all(
        map(torch.equal, backward(some), backward([torch.zeros_like(o) if g is None else g for g, o in zip(some, out)]))
    )
    assert all((v == 0).all() for v in backward([None] * (2 * S))[:-1])


@every
def test_tangent_equals_forward_mode_through_forward(case):
    t = case.tensors(requires_grad=False)
    v = {k: torch.randn_like(u) for k, u in t.items()}

    def forward(*values):
        return tuple(reference.forward(*arguments(case, dict(zip(t, values))), 1))

    want = torch.func.jvp(forward, tuple(t.values()), tuple(v.values()))[1]
    _, *primal = arguments(case, t)
    moving = arguments(case, v)
    cell, weights, state, steps = gk.cells.get(case.cell), (*primal[:6], None), primal[6], primal[7:]
    seq, final = reference.tangent(cell, weights, (*moving[1:7], None), state, moving[7], *steps)
    assert_close_to_truth([*seq, *final], list(want), list(want), name=str(case))
    nothing = reference.tangent(cell, weights, [None] * 7, state, [None] * len(state), *steps)
    assert all((u == 0).all() for part in nothing for u in part)


@pytest.mark.parametrize("sizes", [[3, 3, 2, 1], [4], [2, 2], [3, 1, 0], [0, 0], []], ids=str)
@pytest.mark.parametrize("reverse", (False, True))
def test_the_state_that_enters_each_row(sizes, reverse):
    """Against walking the steps one after the other."""
    N, B = sum(sizes), 4
    y, h0 = torch.arange(1.0, N + 1).unsqueeze(1), -torch.arange(1.0, B + 1).unsqueeze(1)
    want, state, first = torch.zeros(N, 1), h0.clone(), [sum(sizes[:k]) for k in range(len(sizes))]
    for k in reversed(range(len(sizes))) if reverse else range(len(sizes)):
        rows = slice(first[k], first[k] + sizes[k])
        want[rows] = state[: sizes[k]]
        state[: sizes[k]] = y[rows]
    assert torch.equal(reference.previous(y, h0, torch.tensor(sizes, dtype=torch.long), reverse), want)


@pytest.mark.parametrize("layout", ("dense", "packed"))
@pytest.mark.parametrize("cell", ("lstm", "gru", "gru_reset_before"))
@pytest.mark.parametrize("reverse", (False, True))
def test_mapped_weight_gradients(cell, layout, reverse):
    """Independent batches side by side: each gradient is that of its own batch."""
    case, N, c = Case(cell, layout=layout, R=0), 3, gk.cells.get(cell)
    rows, B, GH, H = len(case.rows), case.B, GATES[cell] * case.H, case.H
    need = [True] * 5 + [False]
    new = lambda *shape: torch.randn(*shape, dtype=torch.double)
    parts = {"dgates": new(rows, N, GH), "dr": new(rows, N, GH), "operand": new(rows, N, H), "x": new(rows, N, 4)}
    y, h0, sizes = new(rows, N, H), new(B, N, H), case.batch_sizes if layout == "packed" else None

    def call(p, y, h0, sizes, mapped):
        more = (p["x"], y, None, h0, sizes, reverse, need)
        return reference.weight_gradients(c, p["dgates"], p["dr"], p["operand"], None, None, *more, mapped=mapped)

    flat = {k: v.flatten(0, 1) for k, v in parts.items()}
    got = call(flat, y.flatten(0, 1), h0.flatten(0, 1), None if sizes is None else sizes * N, N)
    for k in range(N):
        want = call({n: v[:, k] for n, v in parts.items()}, y[:, k], h0[:, k], sizes, None)
        assert_close_to_truth([g[k] for g in got], want, want)


def test_sixteen_bits_are_rounded_once():
    """float32 inside: what comes out is the float32 result, rounded."""
    case = Case("gru", T=20, H=16)
    low = case.tensors(torch.bfloat16, requires_grad=False)
    a = reference.forward(*arguments(case, low), 1)
    b = reference.forward(*arguments(case, {k: v.float() for k, v in low.items()}), 1)
    assert all(torch.equal(u, v.bfloat16()) for u, v in zip(a, b))


def test_it_runs_everywhere():
    assert reference.why_not() is None
    assert reference.why_not(gk.cells.get("gru"), torch.float16, torch.device("cuda")) is None


def test_names_and_reasons(monkeypatch):
    assert list(gk.backends()) == list(backends.NAMES) and gk.backends()["reference"] is None
    with pytest.raises(ValueError, match="unknown backend 'gpu'; there are reference, cpu"):
        backends.load("gpu")


@pytest.fixture
def broken(monkeypatch):
    """A machine on which the compiled kernels cannot run."""
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends.load("cpu"), "why_not", lambda *_: "no compiler here")


def test_a_backend_that_was_named_never_falls_back(broken):
    x, w = torch.zeros(2, 1, 4), torch.zeros(4, 4)
    with pytest.raises(
        RuntimeError, match="backend 'cpu' cannot run rnn_tanh in torch.float32 on cpu: no compiler here"
    ):
        gk.ops.recurrent(x, w, cell="rnn_tanh", backend="cpu")
    gk.ops.recurrent(x, w, cell="rnn_tanh")
    assert backends.last() == "reference" and gk.backends()["cpu"] == "no compiler here"
