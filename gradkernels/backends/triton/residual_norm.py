"""norm(residual + dropout(x)) over rows in Triton: one pass over memory forward, one backward.

Dims: M rows, N values of a row, a multiple of ALIGN, so that loads are as wide as rows allow; BM, BN tile of a program.

A row lies in the registers of one program, up to what WIDEST says; a longer one is walked twice, the second time out of L2.
The sum is rounded to storage before it is normalised, so that backward, which reads it back, has the very numbers of forward.
Statistics are in float32 (float64 for float64).

Values moved in each place of a row, which at the bandwidth of the memory is the least time there is:
    forward   reads x, residual, writes s, y: 4; LayerNorm alone reads x, writes y: 2
    backward  reads dy, ds, s, writes dx, and with dropout dresidual: 4 or 5; LayerNorm alone reads dy, x, writes dx: 3
              of rows beyond the registers dy and s once more
Masks are drawn again from seed and place. Gradients of the weights are summed in registers over a run of rows in a program, then
over the programs, both in a fixed order; a program writes N of these sums, a few in a hundred of what it reads.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradkernels.backends import triton as here
from gradkernels.backends._sequence import _on
from gradkernels.backends.reference.philox import limit
from gradkernels.backends.reference.residual_norm import summed
from gradkernels.backends.triton.functions import sqrt
from gradkernels.backends.triton.launch import Limits, launch, limits, options
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


# ---------------------------------------------------------------- launch

TILE = 1024  # values of a program, unless a row has more
VALUES = 8  # of a thread, unless there are no more threads
FORWARD, BACKWARD = 1024, 512  # threads of the largest program; backward of all that a multiprocessor is given, too
CHUNK = 4096  # values at a time of a row that does not stay in registers
# The longest row that does, by bytes of a value: forward, backward, backward with gradients of the weights.
WIDEST = {2: (32768, 16384, 8192), 4: (32768, 16384, 8192), 8: (8192, 8192, 4096)}


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return here.why_not(None, dtype, device)


def _tile(N: int, widest: int, threads: int, at: Limits) -> tuple[dict[str, int], dict[str, Any]]:
    """BM, BN, and how to launch."""
    # the least power of two that is no less than N; Triton's own function takes a microsecond
    BN = max(16, 1 << (N - 1).bit_length()) if N <= widest else CHUNK
    BM = max(TILE // BN, 1)
    return {"BM": BM, "BN": BN}, options(min(BM * BN // VALUES, threads) // at.lanes)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _arguments(x: Tensor, weight: Tensor | None, seed: Tensor | None, p: float, rms: bool) -> dict[str, Any]:
    """What both directions are told, by name; x is contiguous."""
    (below, scale), N = limit(p), x.shape[-1]
    align = math.gcd(N, 16) or 1
    return {
        "M": x.numel() // N if N else 0, "n": N // align, "ALIGN": align, "seed": seed, "below": below, "scale": scale,
        "weight": weight if weight is None else weight.contiguous(), "RMS": rms,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }  # fmt: skip


def forward(
    x: Tensor,  # [.., N]
    residual: Tensor | None,  # [.., N]
    weight: Tensor | None,  # [N]
    bias: Tensor | None,  # [N]
    seed: Tensor | None,  # int64 [1]
    p: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, s, mean [M], rstd [M])"""
    x = x.contiguous()
    given = _arguments(x, weight, seed, p, rms)
    M, N = given["M"], x.shape[-1]
    y = torch.empty_like(x)
    s = torch.empty_like(x) if summed(residual, seed) else None
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd = x.new_empty(M, dtype=computed), x.new_empty(M, dtype=computed)
    if M:
        given |= {"x": x, "residual": residual if residual is None else residual.contiguous(), "y": y, "s": s}
        given |= {"bias": bias if bias is None else bias.contiguous(), "mean": mean, "rstd": rstd, "eps": eps}
        with _on(x.device):
            tile, chosen = _tile(N, WIDEST[x.dtype.itemsize][0], FORWARD, limits())
            given |= tile | {"WHOLE": N <= tile["BN"]}
            launch(norm_forward, (_ceil(M, tile["BM"]),), given, chosen)
    return y, x.new_empty(0) if s is None else s, mean, rstd


def backward(
    grads: Sequence[Any],  # of the results; None is zero
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    p: float,
    eps: float,
    rms: bool,
) -> list[Tensor | None]:
    """The gradients of (x, residual, weight, bias, seed) that are needed."""
    (dy, dsum), (x, residual, weight, bias, seed), (_, s, mean, rstd) = grads, tensors, outputs
    if not summed(residual, seed):
        s, dsum = x, None
    s = s.contiguous()
    given = _arguments(s, weight, seed, p, rms)
    M, N = given["M"], x.shape[-1]
    got = [torch.empty_like(s) if wanted else None for wanted in need[:2]]
    got += [torch.empty_like(v) if wanted else None for v, wanted in zip((weight, bias), need[2:4])]
    if not M:
        return [*(v if v is None else v.zero_() for v in got), None]
    with _on(x.device):
        at = limits()
        tile, chosen = _tile(N, WIDEST[x.dtype.itemsize][1 + any(need[2:4])], BACKWARD, at)
        parts = _ceil(N, tile["BN"])
        resident = BACKWARD // (chosen["num_warps"] * at.lanes)  # programs of a multiprocessor
        run = _ceil(_ceil(M, tile["BM"]), max(at.multiprocessors * resident // parts, 1)) * tile["BM"]
        runs = _ceil(M, run)
        # tiles of dy, ds and s of the next rows are on their way, as long as three quarters of shared memory hold them
        bytes = 3 * tile["BM"] * tile["BN"] * x.dtype.itemsize
        given["STAGES"] = min(3, 1 + at.shared * 3 // 4 // resident // bytes)
        sums = [mean.new_empty(runs, N) if wanted else None for wanted in need[2:4]]
        dy, dsum = (v if v is None else v.contiguous() for v in (dy, dsum))
        given |= {"dy": dy, "dsum": dsum, "s": s, "mean": mean, "rstd": rstd, "tilts": None, "RUN": run, **tile}
        given |= {"dx": got[0], "dresidual": got[1], "dweight": sums[0], "dbias": sums[1]}
        if parts > 1 and dy is not None:
            given["tilts"] = mean.new_empty(2, M)
            launch(norm_tilts, (M,), given, options(CHUNK // (VALUES * at.lanes)))
        launch(norm_backward, (runs, parts), given, chosen)
        if any(need[2:4]):
            BM, BN = (16, 128) if runs <= 16 else (128, 16)
            given |= {"weight_sums": sums[0], "bias_sums": sums[1], "dweight": got[2], "dbias": got[3]}
            launch(add_runs, (_ceil(N, BN),), given | {"RUNS": runs, "BM": BM, "BN": BN}, options(4))
    return [*got, None]
