"""The kernels of causal_conv1d.py: products of taps, and the gradient of the weights.

Dims: B sequences, T tokens of a sequence, N tokens in all, C channels in, O channels out, K taps; BM, BN, BK tile.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------- forward, and the gradient of x


@triton.jit
def token_rows(start, T, B: tl.constexpr):
    """Tokens start .. start + B, int64 [B], and where in their sequences they are, int32 [B]."""
    i = tl.arange(0, B)
    return start + i.to(tl.int64), ((start % T).to(tl.int32) + i) % T


@triton.jit(do_not_specialize=["N", "T", "FIRST", "K", "dilation"])
def conv_taps(
    source,  # [N, I]
    weight,  # [U, K, IP], zero beyond I
    bias,  # [U] or None
    to,  # [N, U] to fill
    N,
    T,
    FIRST,  # the first tap that reaches into a sequence
    K,
    dilation,
    LATER: tl.constexpr,  # whether taps lie after their token, as those of the gradient do
    U: tl.constexpr,
    I: tl.constexpr,
    IP: tl.constexpr,  # a multiple of BK
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """to[b, t, u] = bias[u] + sum over k and i of weight[u, k, i] source[b, t -+ (K - 1 - k) dilation, i]."""
    across = tl.cdiv(U, BN)
    row, t = token_rows((tl.program_id(0) // across).to(tl.int64) * BM, T, BM)
    u = tl.program_id(0) % across * BN + tl.arange(0, BN)
    i = tl.arange(0, BK)
    # units beyond U repeat the last one, so that no load of a weight needs a mask
    taps = weight + tl.minimum(u, U - 1).to(tl.int64)[None, :] * K * IP + i[:, None]
    acc = tl.zeros([BM, BN], ACC)
    # one loop over taps and chunks, so that loads of the next tap are on their way while this one is at work
    for step in range(FIRST * (IP // BK), K * (IP // BK)):
        k, first = step // (IP // BK), step % (IP // BK) * BK
        by = (K - 1 - k) * dilation
        if not LATER:
            by = -by
        mask = ((row < N) & (t + by >= 0) & (t + by < T))[:, None]
        if I % BK != 0:
            mask &= (first + i < I)[None, :]
        rows = tl.load(source + (row + by)[:, None] * I + first + i[None, :], mask=mask, other=0.0)
        tap = tl.load(taps + step * BK)
        acc = tl.dot(rows, tap, acc, input_precision=PRECISION, out_dtype=ACC)
    if bias is not None:
        acc += tl.load(bias + u, mask=u < U, other=0.0).to(ACC)[None, :]
    tl.store(
        to + row[:, None] * U + u[None, :], acc.to(to.dtype.element_ty), mask=(row < N)[:, None] & (u < U)[None, :]
    )


# ---------------------------------------------------------------- the gradient of the weights


@triton.jit(do_not_specialize=["N", "T", "RUN", "K", "dilation"])
def conv_weights(
    dy,  # [N, O]
    x,  # [N, C]
    sums,  # [runs, O, C, K] to fill
    N,
    T,
    RUN,  # tokens of a run, a multiple of BK
    K,
    dilation,
    C: tl.constexpr,
    O: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sums[o, c, k] = the sum over tokens of a run of dy[b, t, o] x[b, t - (K - 1 - k) dilation, c]."""
    k, run = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o = tl.program_id(0) // tl.cdiv(C, BN) * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tl.cdiv(C, BN) * BN + tl.arange(0, BN)
    by = tl.minimum((K - 1 - k).to(tl.int64) * dilation, T).to(tl.int32)
    acc = tl.zeros([BM, BN], ACC)
    for first in range(0, tl.minimum(N - run * RUN, RUN).to(tl.int32), BK):
        row, t = token_rows(run * RUN + first, T, BK)
        late = tl.load(dy + row[:, None] * O + o[None, :], mask=(row < N)[:, None] & (o < O)[None, :], other=0.0)
        there = ((row < N) & (t >= by))[:, None] & (c < C)[None, :]
        early = tl.load(x + (row - by)[:, None] * C + c[None, :], mask=there, other=0.0)
        acc = tl.dot(tl.trans(late), early, acc, input_precision=PRECISION, out_dtype=ACC)
    at = ((run * O + o)[:, None] * C + c[None, :]) * K + k
    tl.store(sums + at, acc, mask=(o < O)[:, None] & (c < C)[None, :])
