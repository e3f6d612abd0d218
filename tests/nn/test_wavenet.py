"""WaveNet against the same network of torch's padded convolutions, and one token after the other."""

import copy

import pytest
import torch
import torch.nn.functional as F

import gradkernels as gk
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu


def plain(net, x):
    """In torch operations, channels second as torch's convolutions have them."""

    def conv(layer, v):
        return F.conv1d(F.pad(v, (layer.memory, 0)), layer.weight, layer.bias, dilation=layer.dilation)

    x, skip = conv(net.input, x.mT), 0
    for layer in net.layers:
        a, b = conv(layer.gates, x).chunk(2, 1)
        z = F.conv1d(a.tanh() * b.sigmoid(), layer.paths.weight.unsqueeze(-1), layer.paths.bias)
        x, skip = (x, skip + z) if layer.last else (x + z[:, : layer.channels], skip + z[:, layer.channels :])
    return net.output(F.relu(net.hidden(F.relu(skip.mT))))


def with_gradients(net, f, x):
    x = x.detach().requires_grad_()
    out = f(x)
    names, parameters = zip(*net.named_parameters())
    grads = torch.autograd.grad(out.square().sum(), (x, *parameters))
    return {"out": out, **dict(zip(("input", *names), grads, strict=True))}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    "change", [{}, {"skip_channels": 7, "kernel_size": 3}, {"dilations": (5,), "bias": False}], ids=str
)
def test_values_and_gradients(change, dtype):
    net = gk.nn.WaveNet(3, 5, **{"channels": 17, "dilations": (1, 2, 4, 1, 2), **change}).to(dtype)
    x = torch.randn(2, 33, 3)
    truth = copy.deepcopy(net).double()
    found = [with_gradients(net, f, x.to(dtype)) for f in (net, lambda v: plain(net, v))]
    assert_close_to_truth(*found, with_gradients(truth, lambda v: plain(truth, v), x.double()))


@pytest.mark.parametrize("sizes", ([1] * 11, [4, 7], [3, 0, 8]), ids=str)
def test_steps_give_the_same_numbers_and_gradients(sizes):
    net, x = gk.nn.WaveNet(3, 5, channels=8, kernel_size=3, dilations=(1, 2)).double(), torch.randn(2, 11, 3).double()

    def stepped(v):
        past, parts = None, []
        for part in v.split(sizes, 1):
            y, past = net.step(part, past)
            parts.append(y)
        return torch.cat(parts, 1)

    got, want = (with_gradients(net, f, x) for f in (stepped, net))
    assert_close_to_truth(got, want, want)


def test_the_past_that_counts_and_nothing_ahead():
    net = gk.nn.WaveNet(2, 3, channels=4, dilations=(1, 2, 4)).double()
    x = torch.randn(1, 20, 2, dtype=torch.double, requires_grad=True)
    (grad,) = torch.autograd.grad(net(x)[0, 15].sum(), x)
    touched = grad[0].abs().sum(-1).nonzero().flatten().tolist()
    assert net.receptive_field == 9 and touched == list(range(15 - 8, 16))


def test_without_a_batch_and_empty():
    net = gk.nn.WaveNet(3, 5, channels=4, dilations=(1, 2))
    x = torch.randn(6, 3)
    assert torch.equal(net(x), net(x.unsqueeze(0))[0])
    assert net(torch.zeros(2, 0, 3)).shape == (2, 0, 5) and net(torch.zeros(0, 4, 3)).shape == (0, 4, 5)


def test_every_parameter_learns():
    net = gk.nn.WaveNet(3, 5, channels=4, dilations=(1, 2))
    net(torch.randn(2, 6, 3)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_compiled_in_one_graph_and_exported():
    net, x = gk.nn.WaveNet(3, 5, channels=4, dilations=(1, 2)), torch.randn(2, 9, 3)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))
        T = torch.export.Dim("T", min=2, max=100)
        program = torch.export.export(net, (x,), dynamic_shapes=({1: T},))
        longer = torch.randn(2, 31, 3)
        torch.testing.assert_close(program.module()(longer), net(longer))


def test_second_derivatives():
    net = gk.nn.WaveNet(2, 1, channels=3, dilations=(1, 2)).double()
    x = torch.randn(1, 5, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: net(v).tanh(), (x,), fast_mode=True)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"skip_channels": 0}, "skip_channels must be at least 1, got 0"),
        ({"dilations": ()}, "dilations must name at least one layer"),
        ({"dilations": (1, 0)}, "dilation must be at least 1, got 0"),
    ],
)
def test_wrong_construction(change, text):
    with pytest.raises(ValueError, match=text):
        gk.nn.WaveNet(3, 5, **change)


def test_wrong_calls():
    net = gk.nn.WaveNet(3, 5, channels=4, dilations=(1, 2))
    with pytest.raises(RuntimeError, match=r"x \[2, 4, 7\]"):
        net(torch.zeros(2, 4, 7))
    with pytest.raises(RuntimeError, match="past must be 3 tensors, one per convolution, got 1"):
        net.step(torch.zeros(2, 1, 3), net.step(torch.zeros(2, 1, 3))[1][:1])
