"""Dilated causal convolution in Triton: one product per tap with the rows of tokens that lie `dilation` apart.

Nothing is padded and nothing is unfolded: a tile of tokens adds all its taps up in registers, rows that lie before the start of
their sequence are loaded as zeros, and the gradient of x is the same kernel with the taps on the other side. Only the weights are
put in order first, a row [K, channels] for each unit, so that loads of them are wide.

Dims: B sequences, T tokens of a sequence, N tokens in all, C channels in, O channels out, K taps; BM, BN, BK tile.

Forward and each of the two gradients take 2 N K C O operations; the memory moves (C + O) N values and the weights. Gradients of the
weights are sums over runs of tokens, and then over the runs, in a fixed order: the same bits in every run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkernels.backends import triton
from gradkernels.backends._sequence import _on

if TYPE_CHECKING:
    from gradkernels.backends.triton.launch import Limits, Number

SIZES = (128, 64, 32, 16)  # of a side of a tile


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return triton.why_not(None, dtype, device)


def _sizes(number: Number) -> list[tuple[int, int]]:
    """BM and BN, the largest first: those whose sums fit into registers beside what is on its way."""
    largest = 128 * 128 if number.tensor_cores else 64 * 64 if number.bytes == 4 else 32 * 32
    return [(BM, BN) for BM in SIZES for BN in SIZES if BM * BN <= largest]


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@functools.lru_cache(256)
def _tile(N: int, U: int, number: Number, at: Limits) -> tuple[int, int]:
    """BM and BN that take the fewest clocks."""
    from gradkernels.backends.triton.launch import clocks

    return min(_sizes(number), key=lambda size: clocks(size, N, U, 1, number, at))


def _options(BM: int, BN: int, BK: int, number: Number, at: Limits) -> dict[str, Any]:
    from gradkernels.backends.triton.launch import options, stages

    chosen = options(8 if BM * BN > 64 * 64 else 4)
    return chosen | {"num_stages": stages((BM + BN) * BK, number, at)}


def _apply(source: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, later: bool) -> Tensor:
    """[B, T, U] of source [B, T, I] and weight [U, K, I]."""
    from gradkernels.backends.triton import launch
    from gradkernels.backends.triton.causal_conv1d_kernels import conv_taps

    (B, T, I), (U, K, _), N = source.shape, weight.shape, source.shape[0] * source.shape[1]
    to = source.new_empty(B, T, U)
    with _on(source.device):
        at = launch.limits()
        number = launch.Number.of(source.dtype, at)
        (BM, BN), BK = _tile(N, U, number, at), number.chunk(I)
        weight = F.pad(weight, (0, -I % BK)) if I % BK else weight.contiguous()
        arguments = {
            "source": source.contiguous(), "weight": weight, "to": to,
            "bias": bias if bias is None else bias.contiguous(), "N": N, "T": T,
            "FIRST": max(K - 1 - (T - 1) // dilation, 0), "K": K, "dilation": dilation, "U": U, "LATER": later, "I": I,
            "IP": weight.shape[2], "BM": BM, "BN": BN, "BK": BK, **number.constants,
        }  # fmt: skip
        programs = _ceil(N, BM) * _ceil(U, BN)
        launch.launch(conv_taps, (programs,), arguments, _options(BM, BN, BK, number, at))
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
    from gradkernels.backends.triton import launch
    from gradkernels.backends.triton.causal_conv1d_kernels import conv_weights

    (_, T, C), O, N = x.shape, dy.shape[2], x.shape[0] * x.shape[1]
    with _on(x.device):
        at = launch.limits()
        number = launch.Number.of(x.dtype, at)
        # the largest tile that the weights fill, since runs of tokens give work to all multiprocessors, and no run of less
        # than some chunks
        BM, BN = next((m, n) for m, n in _sizes(number) if m < 2 * max(O, SIZES[-1]) and n < 2 * max(C, SIZES[-1]))
        BK = 128 // number.bytes
        tiles = _ceil(O, BM) * _ceil(C, BN)
        runs = min(_ceil(at.multiprocessors, tiles * K), _ceil(N, 8 * BK))
        run = _ceil(_ceil(N, runs), BK) * BK
        runs = _ceil(N, run)
        sums = x.new_empty(runs, O, C, K, dtype=number.accumulator)
        arguments = {
            "dy": dy, "x": x.contiguous(), "sums": sums, "N": N, "T": T, "RUN": run, "K": K, "dilation": dilation,
            "C": C, "O": O, "BM": BM, "BN": BN, "BK": BK, **number.constants,
        }  # fmt: skip
        launch.launch(conv_weights, (tiles, K, runs), arguments, _options(BM, BN, BK, number, at))
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
