"""Squared norms of gradients: by the kernels and by torch, against float64."""

import pytest
import torch

from gradkernels.ops import _squares
from gradkernels.ops._squares import joined, squares, squares_of_steps

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture(params=("kernels", "torch"), autouse=True)
def route(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(_squares, "_by_kernels", lambda *tensors: False)
    else:
        assert _squares._by_kernels(torch.ones(3))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", (None, 0, 1, 2))
def test_steps(dtype, time):
    g = torch.randn(5, 7, 33).to(dtype)
    rest = [d for d in range(3) if d != time]
    close(squares(g, time), g.double().square().sum(rest))


def test_of_one_dimension_and_of_nothing():
    g = torch.randn(9)
    close(squares(g, 0), g.double().square())
    assert squares(torch.zeros(0, 4), 0).shape == (0,)
    close(squares(torch.zeros(3, 0), 0), torch.zeros(3, dtype=torch.double))
    close(squares(torch.zeros(0)), torch.zeros((), dtype=torch.double))


@pytest.mark.parametrize("scale", (1e-38, 1e-30, 1.0, 1e30, 1e38))
def test_from_end_to_end_of_float32(scale):
    g = torch.rand(3, 20_001).add_(0.5) * scale
    close(squares(g, 0), g.double().square().sum(1))
    close(squares(g), g.double().square().sum())


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
def test_what_is_no_number_is_seen(bad):
    g = torch.randn(4, 50)
    g[2, 49] = bad
    assert squares(g, 0).isfinite().tolist() == [True, True, False, True]


def test_strides_and_differences():
    g, less = torch.randn(6, 5, 8).transpose(0, 1), torch.randn(8).expand(5, 6, 8)
    close(squares(g, 1, less), (g - less).double().square().sum((0, 2)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", (1, 17, 40_000))
def test_joined(dtype, n):
    (a, b), norms = torch.randn(2, n).to(dtype), torch.zeros(4, dtype=torch.double)
    with torch.no_grad():
        both = joined(a, b, norms)
    assert torch.equal(both, a + b)
    # the kernel squares a sum before it is rounded to what it is stored in
    eps = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-12
    want = torch.stack([v.double().square().sum() for v in (a + b, a, b)])
    torch.testing.assert_close(norms[:3], want, rtol=eps, atol=0)
    assert norms[3] == 0


def test_joined_is_differentiable():
    a, b = (torch.randn(5, requires_grad=True) for _ in range(2))
    norms = torch.zeros(3, dtype=torch.double)
    both = joined(a, b, norms)
    both.sum().backward()
    assert a.grad.tolist() == [1.0] * 5 and not norms.requires_grad


def test_packed():
    g, sizes = torch.randn(6, 3), torch.tensor([3, 2, 1])
    want = torch.stack([v.double().square().sum() for v in g.split(sizes.tolist())])
    close(squares_of_steps(g, sizes), want)


def test_the_same_bits_for_any_number_of_threads():
    g, before, found = torch.randn(3, 200_001), torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            norms = torch.zeros(3, dtype=torch.double)
            with torch.no_grad():
                joined(g, g, norms)
            found.add((*squares(g, 0).tolist(), squares(g).item(), *norms.tolist()))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1
