"""The functions of the language in Triton against torch's: a few roundings of every value, large or small."""

import pytest
import torch
import triton
import triton.language as tl

from gradkernels.backends.triton import functions
from tests.close import assert_close_to_truth

NAMES = [n for n in functions.VOCABULARY if n not in ("full_like", "where")]
TORCH = {n: getattr(torch, n) for n in NAMES}
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
        x = x if name in ("log", "sqrt") else torch.cat([x, -x])
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
