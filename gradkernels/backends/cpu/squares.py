"""Squared norms of steps by csrc/cpu/squares.h. Results are the same bits for any number of threads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gradkernels.backends import cpu


def squares(g: Tensor, time: int | None, less: Tensor | None) -> Tensor:
    """As gradkernels.ops._squares has it."""
    shape = g.shape
    M, T, N = (
        (1, 1, g.numel()) if time is None else (math.prod(shape[:time]), shape[time], math.prod(shape[time + 1 :]))
    )
    g, less = g.contiguous(), less if less is None else less.contiguous()
    out = g.new_empty(() if time is None else T, dtype=torch.double)
    cpu.build().squares(cpu.STORAGE[g.dtype], M, T, N, cpu.addresses([g, less, out]), torch.get_num_threads())
    return out


def joined(a: Tensor, b: Tensor, norms: Tensor) -> Tensor:
    """As gradkernels.ops._squares has it."""
    a, b = a.contiguous(), b.contiguous()
    both = cpu.empty(a, *a.shape)
    cpu.build().joined(cpu.STORAGE[a.dtype], a.numel(), cpu.addresses([a, b, both, norms]), torch.get_num_threads())
    return both
