"""The words and factors of the kernels against the reference's, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl

from gradkernels.backends.reference import philox as reference
from gradkernels.backends.triton import philox

SEEDS = (0, -1, 2**62 + 12345, -(2**63), 2**32)


@triton.jit
def store_words(out, seed, row, M: tl.constexpr, BLOCKS: tl.constexpr):
    rows = row + tl.arange(0, M).to(tl.int64)[:, None]
    blocks = tl.arange(0, BLOCKS)[None, :]
    four = philox.words(tl.load(seed), rows, blocks)
    at = tl.arange(0, M)[:, None] * 4 * BLOCKS + 4 * blocks
    for k in tl.static_range(4):
        tl.store(out + at + k, four[k])


@triton.jit(do_not_specialize=["below"])
def store_factors(
    out, seed, row, first, below: tl.uint32, scale: tl.float64, M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr
):
    rows = row + tl.arange(0, M).to(tl.int64)[:, None]
    v = philox.factors(tl.load(seed), rows, first, below, scale, N, DTYPE)
    tl.store(out + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], v)


def places(row, M, first, N):
    return row + torch.arange(M).unsqueeze(1), first + torch.arange(N)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("row", (0, 2**32 - 2), ids=("first rows", "rows past 32 bits"))
def test_words(seed, row):
    out, seed = torch.empty(4, 32, dtype=torch.int32), torch.tensor([seed])
    store_words[(1,)](out, seed, row, 4, 8)
    assert torch.equal(out.long() & 0xFFFFFFFF, reference.words(seed, *places(row, 4, 0, 32)))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("p", (0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 2**-40, 1.0))
@pytest.mark.parametrize("N, first", ((4, 0), (64, 128)))
def test_factors(N, first, p, dtype):
    """At the ends of what a probability can be as well: `below` takes all of 32 bits."""
    out, seed = torch.empty(4, N, dtype=dtype), torch.tensor([-(2**61) + 3])
    number = tl.float64 if dtype is torch.float64 else tl.float32
    store_factors[(1,)](out, seed, 2**31 + 1, first, *reference.limit(p), 4, N, number)
    assert torch.equal(out, reference.factors(seed, p, *places(2**31 + 1, 4, first, N), dtype))
