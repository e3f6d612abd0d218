"""norm(residual + dropout(x)) by csrc/cpu/residual_norm.h. Results are the same bits for any number of threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradkernels.backends import cpu, reference
from gradkernels.backends.reference import philox
from gradkernels.backends.reference.residual_norm import summed


def why_not(dtype: torch.dtype, device: torch.device, *_: Any, **__: Any) -> str | None:
    """The reason why this backend cannot run that, or None."""
    return cpu.why_not(None, dtype, device)


def _options(x: Tensor, seed: Tensor | None, p: float, eps: float, rms: bool) -> tuple[Any, ...]:
    return rms, eps, *philox.number(seed, p), torch.get_num_threads()


def _computed(v: Any) -> Any:
    """A weight in what is computed in."""
    return None if v is None else reference.precise(v).contiguous()


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
    M, N = math.prod(x.shape[:-1]), x.shape[-1]
    x = x.contiguous()
    computed = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = cpu.empty(x, *x.shape)
    s = cpu.empty(x, *x.shape) if summed(residual, seed) else None
    mean, rstd = x.new_empty(M, dtype=computed), x.new_empty(M, dtype=computed)
    if M and N:
        tensors = _computed(weight), _computed(bias), x, residual if residual is None else residual.contiguous()
        at = cpu.addresses([*tensors, y, s, mean, rstd])
        cpu.build().residual_norm_forward(cpu.STORAGE[x.dtype], M, N, at, *_options(x, seed, p, eps, rms))
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
    M, N = mean.shape[0], x.shape[-1]
    dx, dresidual = (cpu.empty(x, *x.shape) if wanted else None for wanted in need[:2])
    sums = [rstd.new_empty(N) if wanted else None for wanted in need[2:4]]
    if M and N:
        dy, dsum = (None if v is None else v.contiguous() for v in (dy, dsum))
        kept = [_computed(weight), None, dy, dsum, s.contiguous(), mean.contiguous(), rstd.contiguous()]
        at = cpu.addresses([*kept, dx, dresidual, *sums])
        cpu.build().residual_norm_backward(cpu.STORAGE[x.dtype], M, N, at, *_options(x, seed, p, eps, rms))
    else:
        sums = [v if v is None else v.zero_() for v in sums]
    return [dx, dresidual, *(v if v is None else v.to(w.dtype) for v, w in zip(sums, (weight, bias))), None]
