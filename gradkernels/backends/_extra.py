"""What a recurrent call may say beyond weights, states and the ragged batch: one bundle, which every backend takes last.

Dims: P parameters of a unit, M masks of the cell, N tokens (rows of x as the caller gave it), B batch, H hidden units.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

DRAWN, FIXED, GIVEN = 0.0, 1.0, 2.0  # where a mask comes from: each token, each row of the batch, `flags`


class Extra(NamedTuple):
    """Of a cell with parameters (P), masks (M) or a delayed state (D), and of a backward that clips.

    A mask is 0 with probability p, else `high`. Mask k of unit u and token n, or with FIXED of column b of the batch, is 0 where

        word(seed, row = k * 2^32 + (first + n  or  b), column = u) < min(floor(p * 2^32), 2^32 - 1)

    in the words of csrc/philox.h, and `high` elsewhere: the same in forward and backward, and on every backend. Without a seed it
    is its mean, (1 - p) * high. With GIVEN it is flags[n], the same for all units, seed or not. Masks have no adjoint.

    Token n is a row of x as it was given: t * B + b padded, with `lengths` too, and the row itself when packed. The column b of a
    packed row is its place in its step.

    d[0] is the first state `skip` steps of the walk before, of the same row, and zero where there was none; its adjoint joins dt[0]
    of that step. With n heads weight_hh is [G*H, H/n] and the recurrence block-diagonal, see _heads.py. With clip > 0 backward clamps dt[0], all that reaches h_t, to [-clip, clip] before anything is made of it.
    """

    params: Tensor | None = None  # [P, H]
    seed: Tensor | None = None  # int64 [1], beside x; None: masks are their means
    noise: tuple[float, ...] = ()  # p, high and DRAWN, FIXED or GIVEN of each mask
    flags: Tensor | None = None  # [N] in the dtype of x
    skip: int = 0  # steps; 0 unless the cell has a delayed state
    clip: float = 0  # 0: off
    first: int = 0  # number of the first token: a window of a longer sequence draws what is there
    heads: int = 1  # blocks of weight_hh


PLAIN = Extra()
