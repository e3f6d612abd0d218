"""Block-diagonal recurrent matrices: [G*H, H/n] for n heads, row u of a gate being what unit u sees of its own head.

Dims: G gates, H hidden units, n heads of K units each, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dense(weight_hh: Tensor, heads: int) -> Tensor:
    """[G*H, K] -> [G*H, H], zero where a unit sees nothing.

    >>> dense(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), 2)
    tensor([[1., 0.],
            [0., 2.],
            [3., 0.],
            [0., 4.]])
    """
    if heads == 1:
        return weight_hh
    K = weight_hh.shape[1]
    blocks = weight_hh.reshape(-1, heads, K, K).movedim(1, -1)
    return torch.diag_embed(blocks, dim1=1, dim2=3).reshape(-1, heads * K)


def blocks(dense_hh: Tensor, heads: int) -> Tensor:
    """[G*H, H] -> [G*H, K], the way back."""
    if heads == 1:
        return dense_hh
    H = dense_hh.shape[1]
    return (
        dense_hh.view(-1, heads, H // heads, heads, H // heads)
        .diagonal(dim1=1, dim2=3)
        .movedim(-1, 1)
        .reshape(-1, H // heads)
    )


def head_by_head(of: Callable[[Tensor, Tensor], Tensor], heads: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A product over tokens, of [N, g*H] and [N, H] to [.., g*H, H], that makes the blocks alone, [.., g*H, K]."""
    if heads == 1:
        return of

    def each(a: Tensor, b: Tensor) -> Tensor:
        K = b.shape[1] // heads
        left = a.unflatten(1, (-1, heads, K)).unbind(2)
        made = [of(u.flatten(1), v).unflatten(-2, (-1, K)) for u, v in zip(left, b.chunk(heads, 1))]  # [.., g, K, K]
        return torch.stack(made, -3).flatten(-4, -2)

    return each
