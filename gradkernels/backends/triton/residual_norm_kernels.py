"""The kernels of residual_norm.py: mathematics of a row, forward, backward.

Dims: M rows, N values of a row, a multiple of ALIGN, so that loads are as wide as rows allow; BM, BN tile of a program.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from gradkernels.backends.triton.functions import sqrt
from gradkernels.backends.triton.philox import factors

# ---------------------------------------------------------------- mathematics


@triton.jit
def moments(v, mask, count, RMS: tl.constexpr):
    """Mean (zero where RMS) and sum of squares around it of `count` values in each row [BM, BN]: [BM, 1] each."""
    mean = tl.zeros([v.shape[0], 1], v.dtype)
    if not RMS:
        mean = tl.sum(v, 1, keep_dims=True) / count
    d = tl.where(mask, v - mean, 0.0)
    return mean, tl.sum(d * d, 1, keep_dims=True)


@triton.jit
def joined(mean, squares, n, more_mean, more_squares, more):
    """Moments of n values and of `more` others, of all of them (Chan, Golub and LeVeque, 1983)."""
    delta, share = more_mean - mean, more / (n + more)
    return mean + delta * share, squares + more_squares + delta * delta * (n * share)


@triton.jit
def tilt(g, unit, N, RMS: tl.constexpr):
    """What backward needs of a row beside its values: the means of g * unit and of g (zero where RMS), [BM, 1]."""
    of_unit = tl.sum(g * unit, 1, keep_dims=True) / N
    of_g = tl.zeros_like(of_unit)
    if not RMS:
        of_g = tl.sum(g, 1, keep_dims=True) / N
    return of_unit, of_g


# ---------------------------------------------------------------- loads and stores


@triton.jit
def load(p, row, column, mask, N, ACC: tl.constexpr):
    """[BM, BN] of p [M, N], zero outside; row int64, column int32, so that addresses are a register and an offset."""
    return tl.load(p + row * N + column, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_weight(p, column, mask, ACC: tl.constexpr):
    """p [N] for every row. Loaded as a tile, so that threads hold the places that they hold of other tiles."""
    return tl.load(tl.broadcast_to(p + column, mask.shape), mask=mask, other=0.0).to(ACC)


@triton.jit
def store(p, row, column, mask, N, v):
    tl.store(p + row * N + column, v.to(p.dtype.element_ty), mask=mask)


@triton.jit
def load_sum(x, residual, seed, row, first, column, mask, N, below, scale, BN: tl.constexpr, ACC: tl.constexpr):
    """residual + dropout(x) as it is stored: [BM, BN]."""
    v = load(x, row, column, mask, N, ACC)
    if seed is not None:
        v *= factors(tl.load(seed), row, first, below, scale, BN, ACC)
    if residual is not None:
        v += load(residual, row, column, mask, N, ACC)
    return v.to(x.dtype.element_ty).to(ACC)


@triton.jit
def store_norm(y, weight, bias, v, mean, rstd, row, column, mask, N, ACC: tl.constexpr):
    v = (v - mean) * rstd
    if weight is not None:
        v *= load_weight(weight, column, mask, ACC)
    if bias is not None:
        v += load_weight(bias, column, mask, ACC)
    store(y, row, column, mask, N, v)


@triton.jit
def load_unit(dy, s, row, column, mask, mean, rstd, N, ACC: tl.constexpr):
    """dy, and the norm before its weight: [BM, BN] each. Past the end of a row dy is zero."""
    d = load(dy, row, column, mask, N, ACC)
    return d, (load(s, row, column, mask, N, ACC) - mean) * rstd


# ---------------------------------------------------------------- forward


@triton.jit(do_not_specialize=["M", "n", "below"])
def norm_forward(
    x,  # [M, N]
    residual,  # [M, N] or None
    weight,  # [N] or None
    bias,  # [N] or None
    seed,  # int64 [1] or None: nothing is dropped
    y,  # [M, N]
    s,  # [M, N], or None where it is x
    mean,  # [M]
    rstd,  # [M]
    M,
    n,  # N / ALIGN
    below: tl.uint32,
    scale: tl.float64,
    eps: tl.float64,
    ALIGN: tl.constexpr,
    RMS: tl.constexpr,
    WHOLE: tl.constexpr,  # whether a tile has all of a row
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    N = n * ALIGN
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM).to(tl.int64)[:, None]
    column = tl.arange(0, BN)[None, :]
    if WHOLE:
        mask = (row < M) & (column < N)
        v = load_sum(x, residual, seed, row, 0, column, mask, N, below, scale, BN, ACC)
        middle, squares = moments(v, mask, N, RMS)
    else:
        middle, squares = tl.zeros([BM, 1], ACC), tl.zeros([BM, 1], ACC)
        for first in range(0, N, BN):
            own = first + column
            mask = (row < M) & (own < N)
            v = load_sum(x, residual, seed, row, first, own, mask, N, below, scale, BN, ACC)
            if s is not None:
                store(s, row, own, mask, N, v)
            count = tl.minimum(N - first, BN).to(ACC)
            more_middle, more_squares = moments(v, mask, count, RMS)
            middle, squares = joined(middle, squares, tl.full([], first, ACC), more_middle, more_squares, count)
    r = 1 / sqrt(squares / N + tl.full([], eps, ACC))
    tl.store(mean + row, middle, mask=row < M)
    tl.store(rstd + row, r, mask=row < M)
    if WHOLE:
        if s is not None:
            store(s, row, column, mask, N, v)
        store_norm(y, weight, bias, v, middle, r, row, column, mask, N, ACC)
    else:
        tl.debug_barrier()  # other threads have stored what is loaded here
        for first in range(0, N, BN):
            own = first + column
            mask = (row < M) & (own < N)
            v = load(x if s is None else s, row, own, mask, N, ACC)
            store_norm(y, weight, bias, v, middle, r, row, own, mask, N, ACC)


# ---------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["M", "n"])
def norm_tilts(
    dy,  # [M, N]
    s,  # [M, N]
    weight,  # [N] or None
    mean,  # [M]
    rstd,  # [M]
    tilts,  # [2, M] to fill: what `tilt` says of each row
    M,
    n,  # N / ALIGN
    ALIGN: tl.constexpr,
    RMS: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Of one row, however long."""
    N = n * ALIGN
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BN)[None, :]
    middle, r = tl.load(mean + row), tl.load(rstd + row)
    of_unit, of_g = tl.zeros([1, BN], ACC), tl.zeros([1, BN], ACC)
    for first in range(0, N, BN):
        own = first + column
        g, unit = load_unit(dy, s, row, own, own < N, middle, r, N, ACC)
        if weight is not None:
            g *= load_weight(weight, own, own < N, ACC)
        of_unit += g * unit
        of_g += g
    tl.store(tilts + row, tl.sum(of_unit) / N)
    tl.store(tilts + M + row, 0.0 if RMS else tl.sum(of_g) / N)


@triton.jit(do_not_specialize=["M", "n", "RUN", "below"])
def norm_backward(
    dy,  # [M, N], or None: zero
    dsum,  # [M, N], or None: zero
    s,  # [M, N]
    mean,  # [M]
    rstd,  # [M]
    weight,  # [N] or None
    seed,  # int64 [1] or None
    tilts,  # [2, M], or None where a tile has all of a row
    dx,  # [M, N], or None where nobody asks
    dresidual,  # the same
    dweight,  # [runs, N], or None: sums over the rows of each run
    dbias,  # the same
    M,
    n,  # N / ALIGN
    RUN,  # rows of a run, a multiple of BM
    below: tl.uint32,
    scale: tl.float64,
    ALIGN: tl.constexpr,
    RMS: tl.constexpr,
    STAGES: tl.constexpr,  # tiles on their way or at work
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    N = n * ALIGN
    run, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BN
    column = start + tl.arange(0, BN)[None, :]
    of_weight, of_bias = tl.zeros([BM, BN], ACC), tl.zeros([BM, BN], ACC)
    if weight is not None:
        w = load_weight(weight, column, tl.broadcast_to(column < N, [BM, BN]), ACC)
    for first in tl.range(0, tl.minimum(M - run * RUN, RUN).to(tl.int32), BM, num_stages=STAGES):
        row = run * RUN + first + tl.arange(0, BM)[:, None]
        mask = (row < M) & (column < N)
        ds = tl.zeros([BM, BN], ACC)
        if dsum is not None:
            ds = load(dsum, row, column, mask, N, ACC)
        if dy is not None:
            middle = tl.load(mean + row, mask=row < M, other=0.0)
            r = tl.load(rstd + row, mask=row < M, other=0.0)
            d, unit = load_unit(dy, s, row, column, mask, middle, r, N, ACC)
            if dweight is not None:
                of_weight += d * unit
            if dbias is not None:
                of_bias += d
            g = d
            if weight is not None:
                g *= w
            if tilts is None:
                of_unit, of_g = tilt(g, unit, N, RMS)
            else:
                of_unit = tl.load(tilts + row, mask=row < M, other=0.0)
                of_g = tl.load(tilts + M + row, mask=row < M, other=0.0)
            ds += r * (g - unit * of_unit - of_g)
        if dresidual is not None:
            store(dresidual, row, column, mask, N, ds)
        if dx is not None:
            if seed is not None:
                ds *= factors(tl.load(seed), row, start, below, scale, BN, ACC)
            store(dx, row, column, mask, N, ds)
    if dweight is not None:
        store(dweight, run, column, column < N, N, tl.sum(of_weight, 0, keep_dims=True))
    if dbias is not None:
        store(dbias, run, column, column < N, N, tl.sum(of_bias, 0, keep_dims=True))


@triton.jit(do_not_specialize=["RUNS", "n"])
def add_runs(
    weight_sums,  # [RUNS, N] or None
    bias_sums,  # [RUNS, N] or None
    dweight,  # [N] to fill, or None
    dbias,  # the same
    RUNS,
    n,  # N / ALIGN
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    ACC: tl.constexpr,
):
    N = n * ALIGN
    column = tl.program_id(0) * BN + tl.arange(0, BN)[None, :]
    of_weight, of_bias = tl.zeros([BM, BN], ACC), tl.zeros([BM, BN], ACC)
    for first in range(0, RUNS, BM):
        run = first + tl.arange(0, BM).to(tl.int64)[:, None]
        mask = (run < RUNS) & (column < N)
        if dweight is not None:
            of_weight += load(weight_sums, run, column, mask, N, ACC)
        if dbias is not None:
            of_bias += load(bias_sums, run, column, mask, N, ACC)
    if dweight is not None:
        store(dweight, 0, column, column < N, N, tl.sum(of_weight, 0, keep_dims=True))
    if dbias is not None:
        store(dbias, 0, column, column < N, N, tl.sum(of_bias, 0, keep_dims=True))
