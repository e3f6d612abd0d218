"""Dilated causal convolution against torch's conv1d of padded channels."""

import pytest
import torch
import torch.nn.functional as F

import gradkernels as gk
from gradkernels.backends import last
from tests.close import assert_close_to_truth

pytestmark = pytest.mark.cpu
SHAPES = [
    (2, 70, 5, 7, 3, 2),
    (1, 1, 3, 4, 2, 8),
    (3, 130, 64, 64, 2, 16),
    (1, 300, 33, 50, 3, 127),
    (2, 17, 16, 1, 4, 1),
]


def theirs(x, weight, bias, dilation):
    return F.conv1d(F.pad(x.mT, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation).mT


def run(f, shape, dtype, like, bias):
    B, T, C, O, K, dilation = shape
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.double).to(like).to(dtype).requires_grad_()
    t = [make(B, T, C), make(O, C, K), make(O)][: 2 + bias]
    y = f(*t, *[None] * (not bias), dilation)
    return {"y": y, "grads": torch.autograd.grad(y, t, make(B, T, O).detach())}


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_values_and_gradients(shape, dtype, bias, backend):
    ours = run(lambda *t: gk.ops.causal_conv1d(*t, backend=backend), shape, dtype, dtype, bias)
    assert last() == backend
    peer, truth = (run(theirs, shape, d, dtype, bias) for d in (dtype, torch.double))
    assert_close_to_truth(ours, peer, truth)


def test_nothing_is_seen_before_its_time(backend):
    x, weight = torch.randn(1, 40, 6, requires_grad=True), torch.randn(5, 6, 3)
    y = gk.ops.causal_conv1d(x, weight, dilation=4, backend=backend)
    (g,) = torch.autograd.grad(y[0, 20].sum(), x)
    assert g[0].any(-1).nonzero().flatten().tolist() == [12, 16, 20]


@pytest.mark.parametrize("shape", ((0, 5, 3), (2, 0, 3)), ids=str)
def test_nothing_to_do(shape, backend):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    y = gk.ops.causal_conv1d(x, weight, backend=backend)
    y.sum().backward()
    assert y.shape == (*shape[:2], 4) and x.grad.shape == shape and not weight.grad.any()


def test_the_same_bits_for_any_number_of_threads():
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(lambda *t: gk.ops.causal_conv1d(*t), SHAPES[2], torch.float32, torch.float32, True))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0]["y"], other["y"]) and all(map(torch.equal, found[0]["grads"], other["grads"]))


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": torch.zeros(2, 5)}, RuntimeError, r"x must be \[B, T, C\], got \[2, 5\]"),
        (
            {"weight": torch.zeros(4, 2, 2)},
            RuntimeError,
            r"weight must be \[O, 3, K\] beside x \[2, 5, 3\], got \[4, 2, 2\]",
        ),
        ({"bias": torch.zeros(3)}, RuntimeError, r"bias must be \[4\] beside weight \[4, 3, 2\], got \[3\]"),
        ({"bias": torch.zeros(4).double()}, RuntimeError, "bias must have x's dtype torch.float32, got torch.float64"),
        ({"x": torch.zeros(2, 5, 3, dtype=torch.long)}, TypeError, "x must be floating point, got torch.int64"),
        ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
        ({"dilation": 0}, ValueError, "dilation must be at least 1, got 0"),
        ({"weight": torch.zeros(4, 3, 2, device="meta")}, RuntimeError, "x is on cpu and weight is on meta"),
        ({"backend": "none"}, ValueError, "unknown backend 'none'"),
    ],
)
def test_errors(change, error, text):
    given = {"x": torch.zeros(2, 5, 3), "weight": torch.zeros(4, 3, 2), "bias": None} | change
    with pytest.raises(error, match=text):
        gk.ops.causal_conv1d(**given)
