"""Whoever listens hears the operator; when nobody does the kernel is called directly, and the numbers are the same."""

import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import gradkernels as gk
from gradkernels.backends import last
from gradkernels.ops import _recurrent_op as op
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, Case, cotangents, gradients

CASE = Case("lstm", T=4, B=3, I=5, H=6)


def inputs(requires_grad=False):
    return list(CASE.tensors(torch.float32, requires_grad).values())


@pytest.fixture
def calls(monkeypatch):
    """Counts kernel calls that did not come through the dispatcher."""
    seen = []

    def watched(tensors, direct=op.direct):
        seen.append(direct(tensors))
        return seen[-1]

    monkeypatch.setattr(op, "direct", watched)
    return seen


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nobody_listens(calls, backend):
    f = CASE.call(backend)
    with torch.no_grad():
        f(*inputs())
    with torch.inference_mode():
        y = f(*inputs())
    assert calls == [True, True] and y[0].is_inference()
    f(*inputs())  # grad mode on, but nothing requires it
    assert calls == [True] * 3
    torch.autograd.grad(f(*(t := inputs(True)))[0].sum(), t, allow_unused=True)
    assert calls[3:] and all(calls)


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no grad", "grad"))
def test_dispatch_modes_hear_the_operator(requires_grad, calls, backend):
    with Names() as mode:
        out = CASE.call(backend)(*inputs(requires_grad))
        if requires_grad:
            sum(o.sum() for o in out).backward()
    assert not any(calls)
    want = ["gradkernels.recurrent_forward.default"] + ["gradkernels.recurrent_backward.default"] * requires_grad
    assert [n for n in mode.names if n.startswith("gradkernels")] == want


def test_counting_flops_and_detecting_anomalies(backend):
    with FlopCounterMode(display=False), torch.autograd.detect_anomaly():
        sum(o.sum() for o in CASE.call(backend)(*inputs(True))).backward()


@pytest.mark.parametrize("pre_dispatch", (False, True))
@pytest.mark.parametrize("tracing_mode", ("real", "fake", "symbolic"))
def test_make_fx(tracing_mode, pre_dispatch, calls, backend):
    f, t = CASE.call(backend), inputs()
    graph = make_fx(f, tracing_mode=tracing_mode, pre_dispatch=pre_dispatch)(*t)
    assert not any(calls)
    assert "gradkernels.recurrent_forward" in graph.code
    assert all(map(torch.equal, graph(*t), f(*t)))


def test_profiler_sees_the_operator(calls, backend):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        CASE.call(backend)(*inputs())
    assert not any(calls) and any(e.key == "gradkernels::recurrent_forward" for e in profile.key_averages())


def test_function_modes_hear_the_operator(calls, backend):
    with place.device:
        CASE.call(backend)(*inputs())
    assert not any(calls)


class Logged(torch.Tensor):
    names: list = []  # noqa: RUF012 - one list for the test

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs)


def test_subclasses_hear_the_operator(calls, backend):
    x, *rest = inputs()
    y = CASE.call(backend)(x.as_subclass(Logged), *rest)
    assert not any(calls)
    assert any("recurrent_forward" in n for n in Logged.names) and isinstance(y[0], Logged)


def test_lazy_negation(calls, backend):
    """A view that is stored with the other sign: the memory alone is not the tensor."""
    x, *rest = inputs()
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, x)
    assert all(map(torch.equal, CASE.call(backend)(lazy, *rest), CASE.call(backend)(x, *rest)))


@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")  # of shapes that became constants
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_records_the_operator(backend):
    f, t = CASE.call(backend), inputs()
    traced = torch.jit.trace(f, tuple(t), check_trace=False)
    assert "recurrent_forward" in str(traced.graph)
    assert all(map(torch.equal, traced(*t), f(*t)))


def test_every_way_gives_the_same_bits(backend):
    f, t = CASE.call(backend), inputs()
    with torch.no_grad():
        want = f(*t)
    with FlopCounterMode(display=False):
        assert all(map(torch.equal, f(*t), want))
    assert all(map(torch.equal, f(*inputs(True)), want))
    assert all(map(torch.equal, torch.func.vmap(f, in_dims=tuple([0] + [None] * (len(t) - 1)))(t[0].unsqueeze(0), *t[1:]), [w.unsqueeze(0) for w in want]))  # fmt: skip


@pytest.mark.parametrize("cell", ("lstm", "gru_reset_before"))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_autocast(cell, dtype, backend):
    case = Case(cell, T=6, B=3, I=8, H=16)
    low = case.tensors(dtype, requires_grad=False)
    t = {k: v.float().requires_grad_() for k, v in low.items()}
    with torch.autocast(place.device.type, dtype):
        out = case.call(backend)(*t.values())
    assert all(o.dtype == dtype for o in out)
    random = cotangents(out)
    grads = torch.autograd.grad(out, list(t.values()), [c.to(dtype) for c in random])
    assert all(g.dtype == torch.float32 for g in grads)
    want = gradients(case.call(backend), {k: v.requires_grad_() for k, v in low.items()}, random)
    assert all(map(torch.equal, out, want[0]))
    assert all(torch.equal(a.to(dtype), b) for a, b in zip(grads, want[1].values()))


@pytest.mark.float64
def test_autocast_leaves_float64_alone_and_is_off_inside(backend):
    case = Case("lstm")
    t = case.tensors()
    want = gradients(case.call(backend), t, random := cotangents(case.loop()(*t.values())))
    with torch.autocast(place.device.type, torch.bfloat16):
        got = gradients(case.call(backend), t, random)
    assert_close_to_truth(got, want, want)
    single = case.tensors(torch.float32)
    out = case.call(backend)(*single.values())
    plain = torch.autograd.grad(out, list(single.values()), [c.float() for c in random], retain_graph=True)
    with torch.autocast(place.device.type, torch.bfloat16):  # a backward that runs where autocast is on
        inside = torch.autograd.grad(out, list(single.values()), [c.float() for c in random])
    assert all(map(torch.equal, plain, inside))


@pytest.mark.parametrize("requires_grad", (False, True), ids=("no grad", "grad"))
def test_autocast_makes_the_states(requires_grad, backend):
    t = Case("lstm").tensors(torch.float32, requires_grad)
    args = {k: t[k] for k in ("weight_ih", "bias_ih", "bias_hh")}
    with torch.autocast(place.device.type, torch.bfloat16):
        y, final = gk.ops.recurrent(t["x"], t["weight_hh"], **args, backend=backend)
        zeros = [place.zeros(3, 6) for _ in range(2)]
        want, _ = gk.ops.recurrent(t["x"], t["weight_hh"], zeros, **args, backend=backend)
    assert torch.equal(y, want) and all(v.dtype == torch.bfloat16 for v in (y, *final))


def test_autocast_and_second_derivatives(backend):
    t = Case("lstm").tensors(torch.float32)
    with torch.autocast(place.device.type, torch.bfloat16):
        y = Case("lstm").call(backend)(*t.values())[0]
        g = torch.autograd.grad(y.float().square().sum(), t["x"], create_graph=True)[0]
    g.square().sum().backward()
    assert all(v.grad is not None and v.grad.isfinite().all() for k, v in t.items())
    assert t["weight_hh"].grad.abs().sum() > 0


@pytest.mark.parametrize("cell", GATES)
def test_many_threads_at_once(cell, backend):
    cases = [
        Case(cell, T=9, B=3, H=h, layout=a) for h, a in ((5, "dense"), (16, "packed"), (33, "lengths"), (8, "dense"))
    ]
    sets = [case.tensors(torch.float32) for case in cases]
    random = [cotangents(c.loop()(*t.values())) for c, t in zip(cases, sets)]
    want = [gradients(c.call(backend), t, r) for c, t, r in zip(cases, sets, random)]
    wrong = []

    def work(k):
        for _ in range(5):
            out, grads = gradients(cases[k].call(backend), sets[k], random[k])
            same = all(map(torch.equal, out, want[k][0])) and all(torch.equal(grads[n], want[k][1][n]) for n in grads)
            if not same or last() != backend:
                wrong.append((k, last()))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(cases))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_the_backend_is_remembered_by_thread(backend):
    CASE.call(backend)(*inputs())
    seen = []
    thread = threading.Thread(target=lambda: seen.append(last()))
    thread.start()
    thread.join()
    assert seen == [None] and last() == backend


def test_no_backend_named_takes_the_best():
    CASE.call(None)(*inputs())
    assert last() == ("cpu" if gk.backends()["cpu"] is None else "reference")


@pytest.mark.cpu
def test_a_cell_object(backend):
    """A registered cell may be given itself, and one of a user's own, under every transform."""
    t, f = inputs(), CASE.call(backend)
    other = Case("lstm", T=4, B=3, I=5, H=6).call(backend, cell=gk.cells.get("lstm"))
    assert all(map(torch.equal, other(*t), f(*t)))

    @gk.cell
    def lstm(x, r, s):  # the name of another cell, on purpose
        return tanh(x[0] + r[0]) * sigmoid(x[1] + r[1])  # noqa: F821

    x, w = torch.randn(3, 2, 8, dtype=torch.double), torch.randn(8, 4, dtype=torch.double, requires_grad=True)
    state = [torch.zeros(2, 4, dtype=torch.double)]

    def call(w):
        return gk.ops.recurrent(x, w, state, cell=lstm, backend=backend)[0]

    assert torch.autograd.gradcheck(call, w) and torch.autograd.gradgradcheck(call, w) and last() == backend
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(w), call(w))
