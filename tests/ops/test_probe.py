"""The probe: its gradient is what autograd's own retain_grad shows, step by step, of a layer written out."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, STEPS, Case

CASES = [
    Case(cell, T=6, B=4, layout=a, reverse=r)
    for cell in GATES
    for a in ("dense", "packed", "lengths")
    for r in (False, True)
]
CASES += [Case("lstm", R=3, layout=layout) for layout in ("dense", "lengths")]


def call(case, t, probe, backend, batch=slice(None)):
    """The sequence of the first state and the final states."""
    t = dict(t)
    state = [t.pop(k)[batch] for k in case.names if k.startswith("state")]
    x, w = t.pop("x"), t.pop("weight_hh")
    kwargs = {"packed": {"batch_sizes": case.batch_sizes}, "lengths": {"lengths": case.lengths}}.get(case.layout, {})
    x = x if case.layout == "packed" else x[:, batch]
    return gk.ops.recurrent(
        x, w, state, **t, **kwargs, cell=case.cell, reverse=case.reverse, probe=probe, backend=backend
    )


def number(case, y, final):
    """A loss: late outputs and the final states."""
    return y[-2:].square().sum() + sum((k + 1) * v.sin().sum() for k, v in enumerate(final))


def truth(case):
    """[T, S + 1]: every step is run on the rows that are alive, and its new states are asked for their gradient."""
    t = case.tensors()
    x = t["x"]
    if case.layout == "packed":
        x = x.new_zeros(case.T * case.B, case.I).index_copy(0, case.rows, x).unflatten(0, (case.T, case.B))
    state, steps, y = [t[k] for k in case.names if k.startswith("state")], [None] * case.T, [None] * case.T

    def product(v, rows=slice(None)):
        return F.linear(v, t["weight_hh"][rows], t["bias_hh"][rows])

    for k in reversed(range(case.T)) if case.reverse else range(case.T):
        live = (k < case.lengths).nonzero().squeeze(1).to(place.device)
        gates = F.linear(x[k][live], t["weight_ih"], t["bias_ih"])
        new = STEPS[case.cell](gates, [v[live] for v in state], product)
        new = [F.linear(new[0], t["weight_hr"]) if case.R else new[0], *new[1:]]
        for v in new:
            v.retain_grad()
        state = [v.index_copy(0, live, u) for v, u in zip(state, new)]
        y[k], steps[k] = torch.zeros_like(state[0]).index_copy(0, live, new[0]), new
    y = torch.stack(y)
    number(case, y.flatten(0, 1)[case.rows] if case.layout == "packed" else y, state).backward()
    return place.tensor([[*(v.grad.square().sum() for v in new), len(new[0])] for new in steps], dtype=torch.double)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_squared_norms_of_every_step(case, dtype, backend):
    want = truth(case)
    probe = place.zeros(case.T, want.shape[1], dtype=torch.double, requires_grad=True)
    number(case, *call(case, case.tensors(dtype), probe, backend)).backward()
    assert probe.grad.dtype == torch.double
    assert torch.equal(probe.grad[:, -1], want[:, -1])
    # measured in double, computed in dtype
    assert_close_to_truth(probe.grad.to(dtype), want.to(dtype), want, name=str(case))


@pytest.mark.parametrize("T", (3, 6, 9))
@pytest.mark.float64
def test_a_probe_of_another_length(T, backend):
    case = Case("lstm", T=6)
    exact, other = (place.zeros(n, 3, dtype=torch.double, requires_grad=True) for n in (6, T))
    for probe in (exact, other):
        number(case, *call(case, case.tensors(), probe, backend)).backward()
    assert torch.equal(other.grad[: min(T, 6)], exact.grad[max(0, 6 - T) :])
    assert other.grad.shape == (T, 3) and (other.grad[6:] == 0).all()


def test_no_probe_changes_nothing(backend):
    case = Case("lstm")
    grads = []
    for probe in (
        None,
        place.zeros(5, 3, dtype=torch.double, requires_grad=True),
        place.zeros(5, 3, dtype=torch.double),
    ):
        t = case.tensors(torch.float32)
        number(case, *call(case, t, probe, backend)).backward()
        grads.append([v.grad for v in t.values()])
        assert probe is None or probe.requires_grad == (probe.grad is not None)
    assert all(torch.equal(a, b) for a, *rest in zip(*grads) for b in rest)


def flat_call(case, t, probe, backend, x):
    y, final = call(case, {**t, "x": x}, probe, backend)
    return y, *final


@pytest.mark.float64
def test_squares_add_up(backend):
    """Micro-batches, two calls in one graph, a checkpoint: what autograd adds is what is meant."""
    case = Case("lstm", T=5, B=4)
    want = place.zeros(5, 3, dtype=torch.double, requires_grad=True)
    number(case, *call(case, case.tensors(), want, backend)).backward()

    def close(probe):
        assert_close_to_truth(probe.grad, want.grad, want.grad)

    probe = torch.zeros_like(want, requires_grad=True)
    for part in (slice(0, 1), slice(1, 4)):
        number(case, *call(case, case.tensors(), probe, backend, part)).backward()
    close(probe)
    probe, t = torch.zeros_like(want, requires_grad=True), case.tensors()
    sum(number(case, *call(case, t, probe, backend, part)) for part in (slice(0, 3), slice(3, 4))).backward()
    close(probe)
    for reentrant in (True, False):
        probe, t = torch.zeros_like(want, requires_grad=True), case.tensors()
        y, h, c = checkpoint(flat_call, case, t, probe, backend, t["x"], use_reentrant=reentrant)
        number(case, y, (h, c)).backward()
        close(probe)


@pytest.mark.float64
def test_a_graph_of_the_gradient(backend):
    """create_graph: the norms are numbers, not part of the graph."""
    case = Case("gru")
    probe, t = place.zeros(5, 2, dtype=torch.double, requires_grad=True), case.tensors()
    measured, gx = torch.autograd.grad(number(case, *call(case, t, probe, backend)), [probe, t["x"]], create_graph=True)
    assert not measured.requires_grad and gx.requires_grad and (measured[:, 1] == 3).all()
    gx.square().sum().backward()
    assert t["x"].grad.abs().sum() > 0


def test_tiny_gradients_are_measured(backend):
    """Squares of float32 numbers down to 1e-38 fit in float64."""
    case = Case("lstm", T=2, B=1)
    probe = place.zeros(2, 3, dtype=torch.double, requires_grad=True)
    y, _ = call(case, case.tensors(torch.float32), probe, backend)
    torch.autograd.backward(y, torch.full_like(y, 1e-30))
    assert 1e-62 < probe.grad[-1, 0] < 1e-58


@pytest.mark.float64
def test_torch_func_ignores_the_probe(backend):
    case = Case("rnn_tanh")
    probe, t = place.zeros(5, 2, dtype=torch.double, requires_grad=True), case.tensors(requires_grad=False)
    torch.func.grad(lambda x: call(case, {**t, "x": x}, probe, backend)[0].sum())(t["x"])
    assert probe.grad is None
