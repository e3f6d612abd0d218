"""The products of one step, tile by tile, with the matrix streamed from L2 through shared memory.

Rows of both factors begin on multiples of 16 values (`walk.aligned` sees to it), so loads are wide and need no mask along the
contraction where it is a multiple of BK.

Dims: B batch, H units, G gates, K length of the contraction, KW length of a row of the matrix; BM, BU, BK tile.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def gate_products(
    a,  # rows of K values
    row,  # [BM] int64: where each row of a begins
    w,  # [COUNT * H, K]
    u,  # [BU] units
    COUNT: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,  # a multiple of BK
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """COUNT planes [BM, BU]: a w_g^T for each gate. Units beyond H repeat the last one, so that no load needs a mask."""
    k = tl.arange(0, BK)
    left = a + row[:, None] + k[None, :]
    right = w + tl.minimum(u, H - 1).to(tl.int64)[None, :] * K + k[:, None]
    acc = ()
    for _g in tl.static_range(COUNT):
        acc = acc + (tl.zeros([BM, BU], ACC),)
    for _k in range(0, K, BK):
        factor = tl.load(left)
        done = ()
        for g in tl.static_range(COUNT):
            gate = tl.load(right + g * H * K)
            done = done + (tl.dot(factor, gate, acc[g], input_precision=PRECISION, out_dtype=ACC),)
        acc = done
        left += BK
        right += BK
    return acc


@triton.jit
def adjoint_product(
    a,  # rows of K values
    row,  # [BM] int64
    w,  # [K, KW]
    u,  # [BU] columns of w
    end,  # K, or 0: no product
    K: tl.constexpr,
    U: tl.constexpr,  # columns that there are
    KW: tl.constexpr,
    BM: tl.constexpr,
    BU: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """[BM, BU]: a w."""
    k = tl.arange(0, BK)
    left = a + row[:, None] + k[None, :]
    right = w + k.to(tl.int64)[:, None] * KW + u[None, :]
    acc = tl.zeros([BM, BU], ACC)
    for start in range(0, end, BK):
        if K % BK == 0:
            factor = tl.load(left)
        else:
            factor = tl.load(left, mask=(start + k < K)[None, :], other=0.0)
        if K % BK == 0 and U % BU == 0:
            part = tl.load(right)
        else:
            part = tl.load(right, mask=(start + k < K)[:, None] & (u < U)[None, :], other=0.0)
        acc = tl.dot(factor, part, acc, input_precision=PRECISION, out_dtype=ACC)
        left += BK
        right += BK * KW
    return acc


@triton.jit
def add_bias(r, bias, u, FIRST: tl.constexpr, COUNT: tl.constexpr, H: tl.constexpr, ACC: tl.constexpr):
    """Planes of gates FIRST .. FIRST + COUNT, and their bias."""
    if bias is None:
        return r
    out = ()
    for g in tl.static_range(COUNT):
        out = out + (r[g] + tl.load(bias + (FIRST + g) * H + u, mask=u < H, other=0.0).to(ACC)[None, :],)
    return out
