"""torch.compile and torch.export of the call."""

import io

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from torch.utils.checkpoint import checkpoint

import gradkernels as gk
from tests import place
from tests.close import assert_close_to_truth
from tests.ops.case import GATES, Case, cotangents, gradients


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(f, compiler="aot_eager", **kwargs):
    return torch.compile(f, fullgraph=True, backend=compiler, **kwargs)


CASES = [Case(cell) for cell in GATES] + [Case("lstm", R=3, reverse=True), Case("gru", gates=True, bias=False)]
CASES += [Case(cell, layout=layout) for cell in ("lstm", "gru_reset_before") for layout in ("packed", "lengths")]


def train(case, compiler, backend):
    f, t = case.call(backend), case.tensors(torch.float32)
    random = cotangents(case.loop()(*t.values()))
    got, want = gradients(compiled(f, compiler), t, random), gradients(f, t, random)
    assert all(map(torch.equal, got[0], want[0])) and all(torch.equal(got[1][k], want[1][k]) for k in t)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(f, compiler)(*t.values()), want[0]))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compile(case, backend):
    train(case, "aot_eager", backend)


def test_a_compiled_backward_runs_no_second_forward(backend):
    """What backward needs is kept by forward: one operator in each graph."""
    seen = []

    def record(graph, _):
        seen.append([str(n.target) for n in graph.graph.nodes if "gradkernels" in str(n.target)])
        return make_boxed_func(graph.forward)

    t = Case("lstm").tensors(torch.float32)
    out = compiled(Case("lstm").call(backend), aot_autograd(fw_compiler=record, bw_compiler=record))(*t.values())
    sum(o.sum() for o in out).backward()
    assert seen == [["gradkernels.recurrent_forward.default"], ["gradkernels.recurrent_backward.default"]]


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], Case("gru", layout="lengths")], ids=str)
def test_inductor(case, backend):
    train(case, "inductor", backend)


SHAPES = ((8, 5), (9, 5), (9, 7), (2, 2), (13, 3))  # at first no two dimensions alike: they would be one symbol


@pytest.mark.parametrize("how", ("dynamic=True", "mark_dynamic"))
@pytest.mark.parametrize("cell", ("lstm", "gru"))
def test_dynamic_shapes(cell, how, backend):
    """One graph for every T and B; T - 1 == 1 must not make one of its own."""
    counter = CompileCounterWithBackend("aot_eager")
    t = Case(cell).tensors(torch.float32)
    weights = {k: v for k, v in t.items() if k.startswith(("weight_ih", "bias"))}

    def f(x):
        return gk.ops.recurrent(x, t["weight_hh"], **weights, cell=cell, backend=backend)[0]

    g = torch.compile(f, fullgraph=True, backend=counter, dynamic=True if how == "dynamic=True" else None)
    for T, B in SHAPES:
        x = place.randn(T, B, 4, requires_grad=True)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0), torch._dynamo.mark_dynamic(x, 1)
        y, want = g(x), f(x)
        assert torch.equal(y, want)
        assert torch.equal(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (y, want)))
    assert counter.frame_count == 1


def test_dynamic_lengths(backend):
    counter = CompileCounterWithBackend("aot_eager")
    t = Case("lstm").tensors(torch.float32)
    weights = {k: v for k, v in t.items() if k.startswith(("weight_ih", "bias"))}

    def f(x, lengths):
        return gk.ops.recurrent(x, t["weight_hh"], **weights, lengths=lengths, reverse=True, backend=backend)[0]

    g = torch.compile(f, fullgraph=True, backend=counter, dynamic=True)
    for T, B in SHAPES:
        x, n = place.randn(T, B, 4, requires_grad=True), place.randint(0, T + 1, (B,))
        y, want = g(x, n), f(x, n)
        assert torch.equal(*(torch.autograd.grad(v.square().sum(), x)[0] for v in (y, want)))
    assert counter.frame_count == 1


def test_probe_in_a_graph(backend):
    case = Case("lstm")
    x, w_ih, b_ih, w_hh, b_hh, *state = case.tensors(torch.float32).values()
    grads = []

    def f(x, probe):
        kwargs = {"weight_ih": w_ih, "bias_ih": b_ih, "bias_hh": b_hh, "probe": probe, "backend": backend}
        return gk.ops.recurrent(x, w_hh, state, **kwargs)[0].square().sum()

    for g in (f, compiled(f)):
        probe = place.zeros(8, 3, dtype=torch.double, requires_grad=True)
        g(x, probe).backward()
        grads.append(probe.grad)
    assert torch.equal(*grads) and grads[0][:5].abs().sum() > 0


def test_autocast_in_a_graph(backend):
    case = Case("lstm")
    f, t = case.call(backend), case.tensors(torch.float32)
    with torch.autocast(place.device.type, torch.bfloat16):
        got, want = compiled(f)(*t.values()), f(*t.values())
    assert all(map(torch.equal, got, want)) and got[0].dtype == torch.bfloat16
    got[0].float().sum().backward()
    assert t["weight_hh"].grad.abs().sum() > 0


def test_checkpoint_in_a_graph(backend):
    case = Case("gru")
    f, t = case.call(backend), list(case.tensors(torch.float32).values())

    def loss(*v):
        return sum(o.square().sum() for o in checkpoint(f, *v, use_reentrant=False))

    got = torch.autograd.grad(compiled(loss)(*t), t)
    assert all(map(torch.equal, got, torch.autograd.grad(loss(*t), t)))


def test_backward_twice_of_a_graph(backend):
    f, t = Case("lstm").call(backend), list(Case("lstm").tensors(torch.float32).values())
    out = sum(o.square().sum() for o in compiled(f)(*t))
    assert all(map(torch.equal, torch.autograd.grad(out, t, retain_graph=True), torch.autograd.grad(out, t)))


def test_second_derivative_of_a_graph_is_refused(backend):
    f, t = Case("lstm").call(backend), list(Case("lstm").tensors(torch.float32).values())
    g = torch.autograd.grad(compiled(f)(*t)[0].square().sum(), t[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="aot_autograd"):
        g.square().sum().backward()


def test_torch_func_inside_a_graph_is_refused(backend):
    f, (x, *rest) = Case("lstm").call(backend), Case("lstm").tensors(torch.float32, requires_grad=False).values()
    whole = compiled(torch.func.grad(lambda u: f(u, *rest)[0].sum()))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="outside torch.compile"):
        whole(x)


def test_errors_of_a_graph(backend):
    x, *rest = Case("lstm").tensors(torch.float32, requires_grad=False).values()
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match="x.size"):
        compiled(Case("lstm").call(backend))(x[..., :3], *rest)


class Layer(nn.Module):
    def __init__(self, case, backend):
        super().__init__()
        self.case, self.backend = case, backend
        self.names = [k for k in case.names if k.startswith(("weight", "bias"))]
        t = case.tensors(torch.float32)
        for k in self.names:
            self.register_parameter(k, nn.Parameter(t[k].detach()))

    def forward(self, x, lengths=None):
        rest = {k: getattr(self, k) for k in self.names if k != "weight_hh"}
        case = self.case
        kwargs = {"cell": case.cell, "reverse": case.reverse, "backend": self.backend, "lengths": lengths}
        return gk.ops.recurrent(x, self.weight_hh, **rest, **kwargs)


EXPORTED = [Case("lstm"), Case("gru"), Case("lstm", R=3, reverse=True), Case("gru_reset_before")]
SIZES = {0: Dim("T", min=1, max=4096), 1: Dim("B", min=1, max=4096)}


@pytest.mark.parametrize("strict", (False, True), ids=("", "strict"))
@pytest.mark.parametrize("case", EXPORTED, ids=str)
def test_export(case, strict, backend):
    """Dynamic T and B, down to 1; the exported module trains, and survives being written to a file."""
    layer, x = Layer(case, backend), place.randn(6, 4, 4)
    sizes = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if strict else SIZES
    program = export(layer, (x,), dynamic_shapes=(sizes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program.run_decompositions(), file)
    file.seek(0)
    for module in (program.module(), torch.export.load(file).module()):
        for T, B in ((13, 3), (2, 2), *(() if strict else ((1, 1),))):
            z = place.randn(T, B, 4)
            assert torch.equal(module(z)[0], layer(z)[0])
    trained, z = program.module(), place.randn(9, 2, 4)
    trained(z)[0].square().sum().backward()
    layer(z)[0].square().sum().backward()
    own = dict(layer.named_parameters())
    for name, p in trained.named_parameters():
        assert_close_to_truth(p.grad, own[name].grad, own[name].grad.double(), name=name)


def test_export_with_lengths(backend):
    layer, x, n = Layer(Case("lstm", reverse=True), backend), place.randn(6, 4, 4), place.tensor([6, 2, 0, 4])
    program = export(layer, (x, n), dynamic_shapes=(SIZES, {0: SIZES[1]}))
    z, m = place.randn(9, 2, 4), place.tensor([1, 9])
    assert torch.equal(program.module()(z, m)[0], layer(z, m)[0])
