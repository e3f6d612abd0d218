"""Philox4x32-10 by place, in registers: csrc/philox.h says which word belongs where, `reference.philox` defines it.

A kernel takes the seed by address, so that a graph that is replayed draws anew, and `below` and `scale` of
`reference.philox.limit`: `below: tl.uint32` without specialization, `scale: tl.float64`, so that another probability is no
other kernel.

Dims: M rows, N columns.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def words(
    seed,  # int64
    row,  # int64
    block,  # column // 4; broadcasts with row
):
    """The words of the four columns of a block, uint32 each."""
    return tl.philox(seed, block.to(tl.uint32), row.to(tl.uint32), (row >> 32).to(tl.uint32), 0)


@triton.jit
def side_by_side(
    seed,  # int64
    row,  # [M, 1] int64
    first,  # column, a multiple of 4
    N: tl.constexpr,  # a power of two, 4 or more
):
    """The words of columns first .. first + N: [M, N] uint32."""
    w0, w1, w2, w3 = words(seed, row, (first // 4 + tl.arange(0, N // 4))[None, :])
    # four columns of a block lie side by side in a thread, as they do when it loads or stores them
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [row.shape[0], N])


@triton.jit
def factors(
    seed,  # int64
    row,  # [M, 1] int64
    first,  # column, a multiple of 4
    below,  # a place is dropped where its word is below that
    scale,  # what the others are multiplied with
    N: tl.constexpr,  # a power of two, 4 or more
    dtype: tl.constexpr,
):
    """What dropout multiplies rows with in columns first .. first + N: [M, N], 0 where a place is dropped, else scale."""
    return tl.where(side_by_side(seed, row, first, N) < below.to(tl.uint32), 0.0, tl.full([], scale, dtype))
