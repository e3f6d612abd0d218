"""norm(residual + dropout(x)) in torch operations: the definition, on any device, differentiable to any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends.reference import no_autocast, precise
from gradkernels.backends.reference.philox import factors


def why_not(*_: Any, **__: Any) -> None:
    """The definition runs everywhere."""


def _dropped(v: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """Dropout of v ``[.., N]``, rows counted through."""
    if seed is None:
        return v
    rows = torch.arange(v.numel() // max(v.shape[-1], 1), device=v.device).reshape(*v.shape[:-1], 1)
    return v * factors(seed, p, rows, torch.arange(v.shape[-1], device=v.device), v.dtype)


def _sum(x: Tensor, residual: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    s = _dropped(precise(x), seed, p)
    if residual is not None:
        s = s + precise(residual)
    return s.to(x.dtype)


def _statistics(s: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """Mean (zero where rms) and the reciprocal of the root of the mean square around it, each ``[.., 1]``."""
    v = precise(s)
    mean = torch.zeros_like(v[..., :1]) if rms else v.mean(-1, keepdim=True)
    return mean, (v - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()


def definition(
    x: Tensor,  # [.., N]
    residual: Tensor | None,  # [.., N]
    weight: Tensor | None,  # [N]
    bias: Tensor | None,  # [N]
    seed: Tensor | None,  # int64 [1]; without it nothing is dropped
    p: float,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor]:
    """(norm of the sum, the sum); where nothing is added or dropped the sum is x, and not returned again but empty."""
    with no_autocast(x.device):
        s = _sum(x, residual, seed, p)
        mean, rstd = _statistics(s, eps, rms)
        y = (precise(s) - mean) * rstd
        y = y if weight is None else y * precise(weight)
        y = y if bias is None else y + precise(bias)
    return y.to(x.dtype), s if summed(residual, seed) else x.new_empty(0)


def summed(residual: Tensor | None, seed: Tensor | None) -> bool:
    """Whether the sum is another than x."""
    return residual is not None or seed is not None


def forward(x, residual, weight, bias, seed, p, eps, rms):
    """(y, s, mean [M], rstd [M])"""
    y, s = definition(x, residual, weight, bias, seed, p, eps, rms)
    mean, rstd = _statistics(s if summed(residual, seed) else x, eps, rms)
    return y, s, mean.flatten(), rstd.flatten()


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
    shape = (*x.shape[:-1], 1)
    unit = (precise(s) - mean.reshape(shape)) * rstd.reshape(shape)
    got: list[Tensor | None] = [None] * 5
    ds = torch.zeros_like(unit) if dsum is None else precise(dsum)
    if dy is not None:
        d = precise(dy)
        g = d if weight is None else d * precise(weight)
        tilt = unit * (g * unit).mean(-1, keepdim=True)
        ds = ds + rstd.reshape(shape) * (g - tilt - (0 if rms else g.mean(-1, keepdim=True)))
        rows = tuple(range(x.dim() - 1))
        if need[2]:
            got[2] = (d * unit).sum(rows).to(weight.dtype)
        if need[3]:
            got[3] = d.sum(rows).to(bias.dtype)
    else:
        got[2:4] = (torch.zeros_like(v) if wanted else None for v, wanted in zip((weight, bias), need[2:4]))
    if need[1]:
        got[1] = ds.to(x.dtype)
    if need[0]:
        got[0] = _dropped(ds, seed, p).to(x.dtype)
    return got
