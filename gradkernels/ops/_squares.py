"""Squared norms of gradients, in float64: no square of a float32 vanishes there or overflows, and squares add up."""

from __future__ import annotations

import torch
from torch import Tensor

from gradkernels.backends import cpu
from gradkernels.backends.cpu import squares as kernels
from gradkernels.ops._recurrent_op import direct


def _by_kernels(*tensors: Tensor | None) -> bool:
    g = next(v for v in tensors if v is not None)
    return direct(tensors) and cpu.why_not(None, g.dtype, g.device) is None


def squares(g: Tensor, time: int | None = None, less: Tensor | None = None) -> Tensor:
    """The squared norm of g - less, of each step of dimension `time`: [T]; or of all of it: []."""
    if _by_kernels(g, less):
        return kernels.squares(g, time, less)
    g = g if less is None else g - less
    rest = [d for d in range(g.dim()) if d != time]
    # without dimensions that are left, vector_norm would take all
    norm = torch.linalg.vector_norm(g, dim=rest, dtype=torch.double) if rest else g.to(torch.double)
    return norm.square()


def squares_of_steps(g: Tensor, batch_sizes: Tensor | None, time: int = 0) -> Tensor:
    """The squared norm of each step of a gradient whose steps are dimension `time`, or of a packed one [N, ..]: [T]."""
    if batch_sizes is None:
        return squares(g, time)
    token = squares(g, 0)
    step = torch.repeat_interleave(batch_sizes).to(g.device, non_blocking=True)
    return token.new_zeros(batch_sizes.shape[0]).index_add(0, step, token)


def joined(a: Tensor, b: Tensor, norms: Tensor) -> Tensor:
    """a + b; the squared norms of it, of a and of b become the first three of `norms`."""
    if not torch.is_grad_enabled() and _by_kernels(a, b):
        return kernels.joined(a, b, norms)
    both = a + b
    for k, v in enumerate((both, a, b)):
        norms[k] = squares(v.detach())
    return both
