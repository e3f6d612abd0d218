"""Dilated causal convolution in torch operations: the definition, on any device, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkernels.backends.reference import no_autocast, precise


def why_not(*_: Any, **__: Any) -> None:
    """The definition runs everywhere."""


def definition(
    x: Tensor,  # [B, T, C]
    weight: Tensor,  # [O, C, K]
    bias: Tensor | None,  # [O]
    dilation: int,
) -> tuple[Tensor]:
    """(y [B, T, O],): a product per tap, with x moved so many tokens later."""
    dtype, (B, T, _), K = x.dtype, x.shape, weight.shape[2]
    x, weight, bias = map(precise, (x, weight, bias))
    with no_autocast(x.device):
        y = x.new_zeros(B, T, weight.shape[0]) if bias is None else bias.expand(B, T, -1)
        for k in range(K):
            shift = (K - 1 - k) * dilation
            if shift < T:
                y = y + F.pad(F.linear(x[:, : T - shift], weight[:, :, k]), (0, 0, shift, 0))
    return (y.to(dtype),)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int) -> tuple[Tensor]:
    """(y [B, T, O],)"""
    return (definition(x, weight, bias, dilation)[0].contiguous(),)


def backward(
    grads: Sequence[Any],
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    dilation: int,
) -> list[Tensor | None]:
    """The gradients of (x, weight, bias) that are needed."""
    (dy,), (x, weight, _) = grads, tensors
    T, K, dtype = x.shape[1], weight.shape[2], x.dtype
    dy, x, weight = map(precise, (dy, x, weight))
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    with no_autocast(x.device):
        for k in range(K):
            shift = (K - 1 - k) * dilation
            if shift < T:
                late, early = dy[:, shift:], x[:, : T - shift]
                dx[:, : T - shift] += late @ weight[:, :, k]
                dweight[:, :, k] = torch.einsum("bto,btc->oc", late, early)
        made = dx, dweight, dy.sum((0, 1))
    return [v.to(dtype) if wanted else None for v, wanted in zip(made, need)]
