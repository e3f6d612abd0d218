"""What only a GPU can show: graphs, no waiting for the device, streams, its precisions, and the way there and back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

import gradkernels as gk
from gradkernels import backends
from tests import place
from tests.close import assert_close_to_truth
from tests.nn.loop import Loop
from tests.nn.pairs import pair, tensors

pytestmark = pytest.mark.gpu
KINDS = ("LSTM", "GRU", "RNN")
LAYOUTS = ("dense", "packed", "packed, unsorted", "lengths")
STEPS = torch.tensor([3, 7, 1, 4])  # of each row


# the reference walks the steps in Python, and has to read how long they are
@pytest.fixture(params=[place.param(w, n, n) for n, w in place.places() if w is not place.CPU and n != "reference"])
def backend(request):
    with place.at(place.GPU):
        yield request.param


@pytest.fixture
def best():
    with place.at(place.GPU):
        yield best_of(torch.float32)


def best_of(dtype):
    return next(n for n in ("cuda", "triton", "reference") if place.why_not(n, place.GPU, dtype) is None)


def layer_of(kind, backend, **kwargs):
    torch.manual_seed(0)
    return getattr(gk.nn, kind)(5, 9, 2, bidirectional=True, **kwargs, backend=backend).to(place.device)


def given(layout, x):
    """Arguments of a layer."""
    if layout == "dense":
        return (x,)
    if layout == "lengths":
        return x, None, STEPS.to(x.device)
    steps = STEPS if "unsorted" in layout else STEPS.sort(descending=True)[0]
    return (pack_padded_sequence(x, steps, enforce_sorted="unsorted" not in layout),)


def step(layer, *args):
    """Outputs and the gradient of every weight."""
    for p in layer.parameters():
        p.grad = None
    out = tensors(layer(*args))
    out = [v for v in out if v.is_floating_point()]
    sum((k + 1) * v.square().sum() for k, v in enumerate(out)).backward()
    return [*out, *(p.grad for p in layer.parameters())]


def on_a_side_stream(f, times=2):
    """As capture wants it: what is compiled or allocated for good is so before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            out = f()
    torch.cuda.current_stream().wait_stream(side)
    return out


def same(a, b):
    assert len(a) == len(b) > 0 and all(map(torch.equal, a, b))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_of_forward_and_backward(kind, layout, backend):
    """Captured once and replayed with other numbers: what a call without a graph gives, bit for bit."""
    layer, x = layer_of(kind, backend), place.randn(7, 4, 5)
    args = given(layout, x)
    on_a_side_stream(lambda: step(layer, *args))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(layer, *args)
    held = args[0] if layout in ("dense", "lengths") else args[0].data
    for _ in range(3):
        held.copy_(place.randn(*held.shape))
        torch.empty(1 << 22, device=place.device).fill_(
            torch.nan
        )  # memory that the graph might wrongly take for its own
        graph.replay()
        got = [v.clone() for v in out]
        same(got, step(copy.deepcopy(layer), *args))


def test_a_graph_whose_lengths_change(backend):
    """Lengths on the device are input like any other."""
    layer, x, lengths = layer_of("LSTM", backend), place.randn(7, 4, 5), STEPS.to(place.device)
    on_a_side_stream(lambda: step(layer, x, None, lengths))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(layer, x, None, lengths)
    for n in ([7, 0, 3, 7], [0, 0, 0, 0], [1, 2, 3, 4]):
        lengths.copy_(torch.tensor(n))
        graph.replay()
        same([v.clone() for v in out], step(copy.deepcopy(layer), x, None, lengths))


def test_graphed_callables(backend):
    layer, x = layer_of("GRU", backend), place.randn(7, 4, 5)
    want = step(layer, x)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(layer), (x,))
    same(step(graphed, x), want)


@pytest.mark.parametrize("layout", (*LAYOUTS, "lengths on the CPU"))
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_for_the_device(kind, layout, backend):
    layer, x = layer_of(kind, backend), place.randn(7, 4, 5)
    args = (x, None, STEPS) if "CPU" in layout else given(layout, x)
    want = step(layer, *args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(layer, *args)
        with torch.no_grad():
            layer(*args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    same(got, want)


def test_no_probe_waits_for_the_device_either(backend):
    layer, x = layer_of("LSTM", backend), place.randn(7, 4, 5)
    layer.probes = [place.zeros(7, 3, dtype=torch.double, requires_grad=True) for _ in range(4)]
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all((p.grad[:, -1] == 2 * 4).all() and (p.grad > 0).all() for p in layer.probes)  # two steps were taken


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_stream(layout, backend):
    """Work goes to the stream that is current, behind what is there already."""
    layer, x = layer_of("LSTM", backend), place.randn(7, 4, 5)
    want, side = step(layer, *given(layout, x)), torch.cuda.Stream()
    late = torch.full_like(x, torch.nan)
    args = given(layout, late)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # ten milliseconds: whoever does not wait reads NaN
        (late if layout in ("dense", "lengths") else args[0].data).copy_(
            x if layout in ("dense", "lengths") else given(layout, x)[0].data
        )
        got = step(layer, *args)
    torch.cuda.current_stream().wait_stream(side)
    same(got, want)


def test_lengths_on_the_device_are_clamped(backend):
    layer, x = layer_of("LSTM", backend), place.randn(7, 4, 5)
    wild, right = place.tensor([-5, 99, 3, 7]), place.tensor([0, 7, 3, 7])
    same(step(layer, x, None, wild), step(layer, x, None, right))
    same(step(layer, x, None, right.cpu()), step(layer, x, None, right))
    with pytest.raises(RuntimeError, match="lengths must be from 0 to T = 7, got -5"):
        layer(x, None, wild.cpu())


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", (*KINDS, "LSTMCell", "GRUCell", "RNNCell"))
def test_autocast_leaves_in_torchs_dtype(kind, dtype, backend):
    """And computes what the rounded arguments give."""
    ours, theirs = pair(kind, backend, 5, 9)
    x = place.randn(4, 5) if "Cell" in kind else place.randn(7, 4, 5)
    with torch.autocast("cuda", dtype):
        out = tensors(ours(x))
        assert [v.dtype for v in out] == [v.dtype for v in tensors(theirs(x))]
    assert all(v.dtype is dtype for v in out)
    same(out, tensors(copy.deepcopy(ours).to(dtype)(x.to(dtype))))


class Tf32(TorchFunctionMode):
    """Factors of products rounded to the eleven bits that tensor cores take of float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.linear and args[0].dtype is torch.float32:
            args = [self.rounded(v) for v in args[:2]] + list(args[2:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(v):
        bits = (v.detach().contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
        return v + (bits.view(torch.float32) - v).detach()


@pytest.mark.parametrize("allowed", (True, False), ids=("tf32", "ieee"))
@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_what_cudnn_may_make_of_it(kind, allowed, backend):
    ours, theirs = pair(kind, backend, 64, 128)
    x, loop = place.randn(12, 8, 64), Loop(ours)
    truth = step(copy.deepcopy(theirs).double(), x.double())
    if allowed:
        torch._C._set_cudnn_allow_tf32(True)
        with Tf32():
            want = step(loop, x)
    else:
        want = step(theirs, x)
    before = torch.backends.cuda.matmul.allow_tf32
    assert_close_to_truth(step(ours, x), want, truth, name=kind)
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("kind", KINDS)
def test_convert_there_and_back(kind, best):
    model, x = getattr(nn, kind)(5, 9, 2, bidirectional=True).to(place.device), place.randn(7, 4, 5)
    want, pointers = step(model, x), [p.data_ptr() for p in model.parameters()]
    truth = step(copy.deepcopy(model).double(), x.double())
    gk.convert(model)
    assert_close_to_truth(step(model, x), want, truth, name=kind)
    assert backends.last() == best and [p.data_ptr() for p in model.parameters()] == pointers
    gk.convert(model, to="torch")
    assert_close_to_truth(step(model, x), want, truth, name=kind)


def test_there_and_back():
    """A layer goes where its module is sent; no backend named is the best of each place."""
    layer, x = gk.nn.LSTM(5, 9), torch.randn(7, 4, 5)
    want = step(layer, x)
    cpu = backends.last()
    layer.to(place.GPU)
    step(layer, x.to(place.GPU))
    assert backends.last() == best_of(torch.float32)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        step(copy.deepcopy(layer).to(dtype), x.to(place.GPU, dtype))
        assert backends.last() == best_of(dtype)
    same(step(layer.cpu(), x), want)
    assert backends.last() == cpu


def test_a_backend_that_was_named_never_falls_back():
    x, there = torch.zeros(2, 1, 5), gk.nn.LSTM(5, 9, backend="cpu").to(place.GPU)
    with pytest.raises(
        RuntimeError, match="backend 'cpu' cannot run lstm in torch.float32 on cuda:0: it runs on the CPU"
    ):
        there(x.to(place.GPU))
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run lstm in torch.float32 on cpu: "):
            gk.nn.LSTM(5, 9, backend=name)(x)


def test_every_device(backend):
    """Each GPU by its own index, whichever is the current one."""
    want = None
    for index in range(torch.cuda.device_count()):
        layer, x = layer_of("GRU", backend).to(f"cuda:{index}"), torch.randn(7, 4, 5).to(f"cuda:{index}")
        torch.manual_seed(1)
        got = [v.cpu() for v in step(layer, torch.ones_like(x))]
        want = got if want is None else want
        assert_close_to_truth(got, want, [v.double() for v in want])
    assert want is not None


def test_a_long_and_wide_layer(backend):
    """Sizes at which blocks share the state; against torch's own in the same dtype."""
    for dtype, H, B in ((torch.bfloat16, 768, 33), (torch.float32, 513, 17), (torch.float16, 1024, 8)):
        ours, theirs = pair("LSTM", backend, 64, H)
        x = place.randn(40, B, 64)
        truth = step(copy.deepcopy(theirs).double(), x.double())
        ours, theirs = ours.to(dtype), theirs.to(dtype)
        assert_close_to_truth(step(ours, x.to(dtype)), step(theirs, x.to(dtype)), truth, name=f"{dtype} H={H}")


def test_a_cell_of_ones_own():
    """The best backend takes it, with kernels of its own."""

    def leaky(x, r, s):
        z = sigmoid(x[0] + r[0])  # noqa: F821
        return s[0] + z * (tanh(x[1] + r[1]) - s[0])  # noqa: F821

    cell = gk.cells.cell(leaky)
    layer = gk.nn.Recurrent(cell, 5, 9, 2, bidirectional=True).to(place.GPU)
    x = torch.randn(7, 4, 5).to(place.GPU)
    got = step(layer, x)
    assert backends.last() == next(
        n for n in ("cuda", "triton", "reference") if backends.load(n).why_not(cell, torch.float32, place.GPU) is None
    )
    layer.backend = "reference"
    want = step(layer, x)
    truth = step(copy.deepcopy(layer).double(), x.double())
    assert_close_to_truth(got, want, truth)
