"""Philox4x32-10 by place, in torch integers: csrc/philox.h says which word belongs where.

Salmon, Moraes, Dror and Shaw (2011), Parallel random numbers: as easy as 1, 2, 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def _product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32-bit word times m. The parts are multiplied by halves: int64 has no room for 64 bits."""
    low, high = a * (m & 0xFFFF), a * (m >> 16)  # below 2^48
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def words(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The 32-bit words, as int64, of places (row, column), which broadcast; seed int64 ``[1]``.

    >>> import torch
    >>> words(torch.tensor([7]), torch.tensor([[0], [1]]), torch.arange(4)).shape
    torch.Size([2, 4])
    """
    rows, columns = torch.broadcast_tensors(rows, columns)
    x = [columns // 4, rows & LOW, (rows >> 32) & LOW, torch.zeros_like(rows)]
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        high0, low0 = _product(x[0], MULTIPLIERS[0])
        high1, low1 = _product(x[2], MULTIPLIERS[1])
        x = [high1 ^ x[1] ^ k0, low1, high0 ^ x[3] ^ k1, low0]
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    which = columns % 4
    return torch.where(which < 2, torch.where(which == 0, x[0], x[1]), torch.where(which == 2, x[2], x[3]))


def limit(p: float) -> tuple[int, float]:
    """(below, scale) of dropout with probability p: a place whose word is less than `below` is dropped, others are scaled.

    >>> limit(0.25)
    (1073741824, 1.3333333333333333)
    """
    return min(int(p * 2**32), LOW), 1 / (1 - p) if p < 1 else 0.0


def number(seed: Tensor | None, p: float) -> tuple[float, int]:
    """(p, seed) as kernels in C++ take them: 64 bits without a sign, and no dropout without a seed.

    >>> import torch
    >>> number(torch.tensor([-1]), 0.5) == (0.5, 2**64 - 1), number(None, 0.5)
    (True, (0.0, 0))
    """
    return (0.0, 0) if seed is None else (p, int(seed) & (2**64 - 1))


def kept(seed: Tensor, p: float, rows: Tensor, columns: Tensor) -> Tensor:
    """False where something of probability p befalls a place."""
    return words(seed, rows, columns) >= limit(p)[0]


def factors(seed: Tensor, p: float, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where dropout of probability p drops a place, 1 / (1 - p) elsewhere."""
    return kept(seed, p, rows, columns).to(dtype) * limit(p)[1]
