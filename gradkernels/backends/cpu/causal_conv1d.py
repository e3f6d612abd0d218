"""Dilated causal convolution by csrc/cpu/causal_conv.h. Results are the same bits for any number of threads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends import cpu


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return cpu.why_not(None, dtype, device)


def _call(kernel, x: Tensor, weight: Tensor, dilation: int, *more: Tensor | None) -> None:
    (B, T, C), (O, _, K) = x.shape, weight.shape
    at = cpu.addresses([x, weight, *more])
    kernel(cpu.STORAGE[x.dtype], [B, T, C, O, K, dilation], at, torch.get_num_threads())


def forward(
    x: Tensor,  # [B, T, C]
    weight: Tensor,  # [O, C, K]
    bias: Tensor | None,  # [O]
    dilation: int,
) -> tuple[Tensor]:
    """(y [B, T, O],)"""
    y = cpu.empty(x, *x.shape[:2], weight.shape[0])
    if y.numel():
        bias = bias if bias is None else bias.contiguous()
        _call(cpu.build().causal_conv_forward, x.contiguous(), weight.contiguous(), dilation, bias, y)
    return (y,)


def backward(
    grads: Sequence[Any],
    tensors: Sequence[Any],  # the arguments of forward
    outputs: Sequence[Any],  # what it returned
    need: Sequence[bool],
    dilation: int,
) -> list[Tensor | None]:
    """The gradients of (x, weight, bias) that are needed."""
    (dy,), (x, weight, _) = grads, tensors
    shapes = x.shape, weight.shape, weight.shape[:1]
    got = [cpu.empty(x, *shape) if wanted else None for shape, wanted in zip(shapes, need)]
    if dy.numel():
        call = cpu.build().causal_conv_backward
        _call(call, x.contiguous(), weight.contiguous(), dilation, dy.contiguous(), *got)
        return got
    return [v if v is None else v.zero_() for v in got]
