"""Dilated causal convolution of the kernels: values and gradients by name against torch's conv1d of padded channels."""

import pytest
import torch
import torch.nn.functional as F

import gradkernels as gk
from gradkernels.backends.reference import causal_conv1d as definition
from gradkernels.backends.triton import causal_conv1d as kernels
from gradkernels.backends.triton import launch
from gradkernels.backends.triton.launch import Limits
from tests.close import assert_close_to_truth

# B, T, C, O, K, dilation, bias: more tokens and channels than a tile, tokens that a tile shares between sequences, taps
# that reach beyond every sequence, single ones
SHAPES = [
    (2, 70, 5, 7, 3, 2, True),
    (1, 1, 3, 4, 2, 8, True),
    (3, 63, 64, 33, 2, 16, False),
    (1, 300, 17, 127, 3, 127, True),
    (5, 17, 16, 1, 4, 1, False),
    (7, 3, 130, 17, 5, 1, True),
    (1, 40, 1, 1, 1, 3, False),
]


def theirs(x, weight, bias, dilation):
    return F.conv1d(F.pad(x.mT, ((weight.shape[2] - 1) * dilation, 0)), weight, bias, dilation=dilation).mT


def ours(x, weight, bias, dilation):
    y = gk.ops.causal_conv1d(x, weight, bias, dilation, backend="triton")
    assert gk.backends.last() == "triton"
    return y


def tensors(shape, dtype):
    B, T, C, O, K, _, bias = shape
    generator = torch.Generator().manual_seed(1)
    make = lambda *size: torch.randn(*size, generator=generator, dtype=torch.double).to(dtype).requires_grad_()
    return {"x": make(B, T, C), "weight": make(O, C, K)} | ({"bias": make(O)} if bias else {})


def run(f, given, dilation, dtype):
    given = {name: v.detach().to(dtype).requires_grad_() for name, v in given.items()}
    y = f(given["x"], given["weight"], given.get("bias"), dilation)
    generator = torch.Generator().manual_seed(2)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.double).half().to(dtype)  # exact in all of them
    return {"y": y, "grads": dict(zip(given, torch.autograd.grad(y, list(given.values()), dy)))}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.float16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])) + f"-by-{s[5]}" + "-bias" * s[6])
def test_values_and_gradients(shape, dtype):
    given = tensors(shape, dtype)
    got = run(ours, given, shape[5], dtype)
    peer, truth = (run(theirs, given, shape[5], d) for d in (dtype, torch.double))
    assert_close_to_truth(got, peer, truth)


def test_a_program_adds_up_many_runs(monkeypatch):
    """Of tokens, for the gradient of the weights."""
    monkeypatch.setattr(launch, "limits", lambda: Limits(64 << 10, 600, False, True))
    given = tensors((3, 351, 4, 5, 2, 30, True), torch.float32)
    launched, launch_one = [], launch.launch
    note = lambda kernel, grid, *rest: (launched.append(grid), launch_one(kernel, grid, *rest))
    monkeypatch.setattr(launch, "launch", note)
    got = run(ours, given, 30, torch.float32)
    assert [grid[2] for grid in launched if len(grid) == 3] == [5]
    peer, truth = (run(theirs, given, 30, d) for d in (torch.float32, torch.double))
    assert_close_to_truth(got, peer, truth)
    again = run(ours, given, 30, torch.float32)
    assert all(torch.equal(got["grads"][k], again["grads"][k]) for k in given)


def test_gradcheck():
    given = tensors((2, 5, 2, 3, 2, 2, True), torch.float64)
    assert torch.autograd.gradcheck(lambda *v: ours(*v, 2), tuple(given.values()), fast_mode=True)


def test_nothing_is_seen_before_its_time():
    x, weight = torch.randn(2, 40, 6, requires_grad=True), torch.randn(5, 6, 3)
    (g,) = torch.autograd.grad(ours(x, weight, None, 4)[0, 20].sum(), x)
    assert g[0].any(-1).nonzero().flatten().tolist() == [12, 16, 20] and not g[1].any()


def test_sequences_that_share_a_tile_leave_each_other_alone():
    """NaN at the end of one is not seen by the next, nor by what it hands back."""
    x, weight = torch.randn(3, 7, 4), torch.randn(5, 4, 3)
    clean = ours(x, weight, None, 2)
    x[1, 4:] = torch.nan
    y = ours(x.requires_grad_(), weight, None, 2)
    assert torch.equal(y[[0, 2]], clean[[0, 2]]) and torch.equal(y[1, :4], clean[1, :4]) and y[1, 4:].isnan().all()
    dy = torch.ones_like(y)
    dy[1, 2] = torch.nan
    (g,) = torch.autograd.grad(y, x, dy)
    assert not g[[0, 2]].isnan().any() and g[1].isnan().any(-1).tolist() == [True, False, True, *[False] * 4]


def test_taps_beyond_every_sequence():
    """However far apart they are, only the last one counts, and the others have no gradient."""
    given = tensors((2, 9, 3, 4, 3, 0, True), torch.float32)
    far, near = (run(ours, given, dilation, torch.float32) for dilation in (2**40, 9))
    assert torch.equal(far["y"], near["y"]) and all(torch.equal(far["grads"][k], near["grads"][k]) for k in given)
    assert not far["grads"]["weight"][:, :, :2].any() and far["grads"]["weight"][:, :, 2].all()
    expected = F.linear(given["x"], given["weight"][:, :, 2], given["bias"])
    assert_close_to_truth(far["y"], expected, expected.double())


def test_tensors_of_any_layout():
    """Channels first, weights turned around, a bias that is every other value, a gradient that is one number."""
    x, weight, bias = torch.randn(2, 6, 33).mT, torch.randn(3, 6, 5).permute(2, 1, 0), torch.randn(10)[::2]
    found = []
    for given in ((x, weight, bias), (x.contiguous(), weight.contiguous(), bias.contiguous())):
        given = [v.detach().requires_grad_() for v in given]
        y = ours(*given, 2)
        found.append([y, *torch.autograd.grad(y.sum(), given)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("need", ((True, False, False), (False, True, False), (False, False, True), (False,) * 3))
def test_some_gradients(need):
    x, weight, bias = (v.detach() for v in tensors((2, 20, 3, 4, 2, 3, True), torch.float32).values())
    dy = torch.randn(2, 20, 4)
    mine, plain = (m.backward((dy,), (x, weight, bias), (None,), need, 3) for m in (kernels, definition))
    assert [v is not None for v in mine] == list(need)
    assert_close_to_truth(mine, plain, plain)


@pytest.mark.parametrize("shape", ((0, 5, 3), (2, 0, 3)), ids=str)
def test_nothing_to_do(shape):
    x, weight, bias = torch.randn(shape), torch.randn(4, 3, 2), torch.randn(4)
    got = run(ours, {"x": x, "weight": weight, "bias": bias}, 1, torch.float32)
    assert got["y"].shape == (*shape[:2], 4) and got["grads"]["x"].shape == shape
    assert not got["grads"]["weight"].any() and not got["grads"]["bias"].any()
