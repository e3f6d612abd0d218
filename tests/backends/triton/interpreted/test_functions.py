"""The functions of the language in Triton against torch's: a few roundings of every value, large or small."""

import pytest
import torch
import triton
import triton.language as tl

from gradkernels.backends.triton import functions
from gradkernels.cells.bind import torch_functions
from tests.close import assert_close_to_truth

NAMES = [n for n in functions.VOCABULARY if n not in ("full_like", "where", "min", "max", "pow")]
TORCH = torch_functions()
POWERS = (0.5, 1.5, -2.0, 9.0, -3.0, 12.0)
SPECIAL = [0.0, torch.inf, -torch.inf, torch.nan, 89.0, -89.0, 710.0, -710.0]


@triton.jit
def apply(x, y, N, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, F(tl.load(x + i, mask=i < N, other=0.0)), mask=i < N)


def ours(name, x):
    y = torch.empty_like(x)
    apply[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), functions.VOCABULARY[name], 1024)
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # of lanes that are masked
def test_function(name, dtype):
    """Factors of two apart, so that a value of 1e-6 has its own bound."""
    for exponent in (-40, -12, *range(-5, 6)):
        x = torch.linspace(1, 2, 257, dtype=torch.float64).mul(2.0**exponent).to(dtype)
        x = x if name in ("log", "log1p", "sqrt") else torch.cat([x, -x])
        for sign in (x > 0, x < 0):
            part = x[sign]
            assert_close_to_truth(ours(name, part), TORCH[name](part), TORCH[name](part.double()), name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_special_values(name, dtype):
    """Each by itself, since one rule for all of them would be lost beside infinity."""
    x = torch.tensor(SPECIAL, dtype=dtype)
    got, expected = ours(name, x), TORCH[name](x)
    for value, a, b in zip(SPECIAL, got, expected):
        assert_close_to_truth(a, b, b, name=f"{name}({value})")


@triton.jit
def apply_two(x, z, y, F: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, F(tl.load(x + i), tl.load(z + i)))


@pytest.mark.parametrize("name", ["min", "max"])
def test_the_smaller_and_the_larger(name):
    """NaN stays, from either side; equal values are either."""
    points = torch.tensor([-1.0, 0.0, 2.0, torch.inf, -torch.inf, torch.nan, 5.0, 1e-30])
    x, z = (v.flatten() for v in torch.meshgrid(points, points, indexing="ij"))
    y = torch.empty_like(x)
    apply_two[(1,)](x, z, y, functions.VOCABULARY[name], 64)
    torch.testing.assert_close(y, TORCH[name](x, z), rtol=0, atol=0, equal_nan=True)


@triton.jit
def power(x, y, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, functions.pow(tl.load(x + i), N))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("n", POWERS)
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_power(n, dtype):
    x = torch.cat([torch.linspace(-3, 3, 255, dtype=torch.float64).to(dtype), torch.zeros(1, dtype=dtype)])
    y = torch.empty_like(x)
    power[(1,)](x, y, n, 256)
    want = torch.pow(x, n)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.isinf(), want.isinf())
    torch.testing.assert_close(y, want, rtol=2e-6 if dtype == torch.float32 else 1e-13, atol=0, equal_nan=True)


def test_where_and_full_like():
    @triton.jit
    def choose(x, y, BLOCK: tl.constexpr):
        i = tl.arange(0, BLOCK)
        v = tl.load(x + i)
        tl.store(y + i, functions.where(v <= 0, functions.full_like(v, 3), v))

    x = torch.tensor([-1.0, 0.0, torch.nan, 2.0])
    y = torch.empty_like(x)
    choose[(1,)](x, y, 4)
    assert torch.equal(y[:2], torch.tensor([3.0, 3.0])) and y[2].isnan() and y[3] == 2
