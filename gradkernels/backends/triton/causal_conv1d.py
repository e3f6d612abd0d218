"""Dilated causal convolution in Triton: one product per tap with the rows of tokens that lie `dilation` apart.

Nothing is padded and nothing is unfolded: a tile of tokens adds all its taps up in registers, rows that lie before the start of
their sequence are loaded as zeros, and the gradient of x is the same kernel with the taps on the other side. Only the weights are
put in order first, a row [K, channels] for each unit, so that loads of them are wide.

Dims: B sequences, T tokens of a sequence, N tokens in all, C channels in, O channels out, K taps; BM, BN, BK tile.

Forward and each of the two gradients take 2 N K C O operations; the memory moves (C + O) N values and the weights. Gradients of the
weights are sums over runs of tokens, and then over the runs, in a fixed order: the same bits in every run.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from gradkernels.backends import triton as here
from gradkernels.backends._sequence import _on
from gradkernels.backends.triton.launch import ROWS, Limits, Number, clocks, launch, limits, options, stages

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


# ---------------------------------------------------------------- launch

SIZES = (128, 64, 32, 16)


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return here.why_not(None, dtype, device)


def _sizes(number: Number) -> list[tuple[int, int]]:
    """BM and BN, the largest first: those whose sums fit into registers beside what is on its way."""
    largest = 128 * 128 if number.tensor_cores else 64 * 64 if number.bytes == 4 else 32 * 32
    return [(BM, BN) for BM in SIZES for BN in SIZES if BM * BN <= largest]


@functools.lru_cache(256)
def _tile(N: int, U: int, number: Number, at: Limits) -> tuple[int, int]:
    """BM and BN that take the fewest clocks."""
    return min(_sizes(number), key=lambda size: clocks(size, N, U, 1, number, at))


def _options(BM: int, BN: int, BK: int, number: Number, at: Limits) -> dict[str, Any]:
    chosen = options(8 if BM * BN > 64 * 64 else 4)
    return chosen | {"num_stages": stages((BM + BN) * BK, number, at)}


def _apply(source: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, later: bool) -> Tensor:
    """[B, T, U] of source [B, T, I] and weight [U, K, I]."""
    (B, T, I), (U, K, _), N = source.shape, weight.shape, source.shape[0] * source.shape[1]
    to = source.new_empty(B, T, U)
    with _on(source.device):
        at = limits()
        number = Number.of(source.dtype, at)
        (BM, BN), BK = _tile(N, U, number, at), number.chunk(I)
        weight = F.pad(weight, (0, -I % BK)) if I % BK else weight.contiguous()
        arguments = {
            "source": source.contiguous(), "weight": weight, "to": to,
            "bias": bias if bias is None else bias.contiguous(), "N": N, "T": T,
            "FIRST": max(K - 1 - (T - 1) // dilation, 0), "K": K, "dilation": dilation, "U": U, "LATER": later, "I": I,
            "IP": weight.shape[2], "BM": BM, "BN": BN, "BK": BK, **number.constants,
        }  # fmt: skip
        programs = triton.cdiv(N, BM) * triton.cdiv(U, BN)
        launch(conv_taps, (programs,), arguments, _options(BM, BN, BK, number, at))
    return to


def forward(
    x: Tensor,  # [B, T, C]
    weight: Tensor,  # [O, C, K]
    bias: Tensor | None,  # [O]
    dilation: int,
) -> tuple[Tensor]:
    """(y [B, T, O],)"""
    if x.shape[0] * x.shape[1] == 0:
        return (x.new_empty(*x.shape[:2], weight.shape[0]),)
    return (_apply(x, weight.permute(0, 2, 1), bias, min(dilation, x.shape[1]), False),)


def _weight_gradient(dy: Tensor, x: Tensor, K: int, dilation: int) -> Tensor:
    """[O, C, K] of dy [B, T, O] and x [B, T, C], as it is summed."""
    (_, T, C), O, N = x.shape, dy.shape[2], x.shape[0] * x.shape[1]
    with _on(x.device):
        at = limits()
        number = Number.of(x.dtype, at)
        # the largest tile that the weights fill, since runs of tokens give work to all multiprocessors, and no run of less
        # than some chunks
        BM, BN = next((m, n) for m, n in _sizes(number) if (m < 2 * O or m == ROWS) and (n < 2 * C or n == ROWS))
        BK = 128 // number.bytes
        tiles = triton.cdiv(O, BM) * triton.cdiv(C, BN)
        runs = min(triton.cdiv(at.multiprocessors, tiles * K), triton.cdiv(N, 8 * BK))
        run = triton.cdiv(triton.cdiv(N, runs), BK) * BK
        runs = triton.cdiv(N, run)
        sums = x.new_empty(runs, O, C, K, dtype=number.accumulator)
        arguments = {
            "dy": dy, "x": x.contiguous(), "sums": sums, "N": N, "T": T, "RUN": run, "K": K, "dilation": dilation,
            "C": C, "O": O, "BM": BM, "BN": BN, "BK": BK, **number.constants,
        }  # fmt: skip
        launch(conv_weights, (tiles, K, runs), arguments, _options(BM, BN, BK, number, at))
        return sums.sum(0)


def backward(
    grads: Sequence[Any],
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    dilation: int,
) -> list[Tensor | None]:
    """The gradients of (x, weight, bias) that are needed."""
    (dy,), (x, weight, _) = grads, tensors
    if dy.numel() == 0:
        shapes = x.shape, weight.shape, weight.shape[:1]
        return [x.new_zeros(shape) if wanted else None for shape, wanted in zip(shapes, need)]
    dy, dilation = dy.contiguous(), min(dilation, x.shape[1])
    dx = _apply(dy, weight.permute(1, 2, 0), None, dilation, True) if need[0] else None
    dweight = _weight_gradient(dy, x, weight.shape[2], dilation).to(x.dtype) if need[1] else None
    wide = torch.float32 if dy.element_size() == 2 else dy.dtype
    return [dx, dweight, dy.sum((0, 1), dtype=wide).to(x.dtype) if need[2] else None]
