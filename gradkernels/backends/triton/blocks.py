"""What both kinds of kernels share: which rows a step has, and loads and stores of several planes.

A plane is a block [rows, units] of one gate, state or kept value; several of them are a tuple, as cells take them.
Dims: T steps, B batch, N tokens, H units, R width of the first state, G gates, S states, A kept values, P parameters.
"""

# The bodies of kernels are in the language of Triton.
# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def follow(EARLY: tl.constexpr):
    """Where launches overlap: wait until the launch before has ended and all it wrote is to be seen, let the next one begin.

    Every program waits, also one that has nothing to do, so the end of a launch is the end of all before it."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def step_rows(
    t,  # step in time; outside of [0, T) there are no rows
    T,
    B,
    rows,  # [T] or None
    first,  # [T] or None
):
    """How many rows take part in step t, and the token where it begins (int64)."""
    inside = (t >= 0) & (t < T)
    n = tl.where(inside, B, 0)
    start = t.to(tl.int64) * B
    if rows is not None:
        n = tl.load(rows + t, mask=inside, other=0)
    if first is not None:
        start = tl.load(first + t, mask=inside, other=0).to(tl.int64)
    return n, start


@triton.jit
def columns(
    b,  # rows of the walk
    B,
    order,  # [B] or None
):
    """Where these rows are in the states, and within the tokens of a step (int64); rows beyond B are the last one."""
    b = tl.minimum(b, B - 1)
    if order is not None:
        b = tl.load(order + b)
    return b.to(tl.int64)


@triton.jit
def load_planes(
    p,  # planes lie `stride` apart; None: zeros
    offset,  # [rows, units] int64
    stride: tl.constexpr,
    mask,  # [rows, units]
    COUNT: tl.constexpr,
):
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (tl.load(p + offset + k * stride, mask=mask, other=0.0),)
    return out


@triton.jit
def store_planes(p, offset, stride: tl.constexpr, mask, values, COUNT: tl.constexpr):
    for k in tl.static_range(COUNT):
        tl.store(p + offset + k * stride, values[k].to(p.dtype.element_ty), mask=mask)


@triton.jit
def cast(values, COUNT: tl.constexpr, dtype: tl.constexpr):
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (values[k].to(dtype),)
    return out


@triton.jit
def squares(v, mask):
    """The sum of the squares of a plane, in float64."""
    v = tl.where(mask, v, 0.0).to(tl.float64)
    return tl.sum(v * v)  # not axis by axis: Triton 3.6 fails on that for sm_100


@triton.jit
def load_parameters(p, u, H: tl.constexpr, P: tl.constexpr, dtype: tl.constexpr):
    """p [P, H]: P rows [1, units] for these units."""
    out = ()
    for k in tl.static_range(P):
        out = out + (tl.load(p + k * H + u, mask=u < H, other=0.0).to(dtype)[None, :],)
    return out


@triton.jit
def delayed(
    sequence,  # [N, H] first states
    b,  # rows of the walk
    col,
    u,
    n,  # rows that the earlier step has, and the step at hand
    start,  # token where the earlier step begins
    H: tl.constexpr,
    dtype: tl.constexpr,
):
    """The first state of an earlier step, zero where there was none."""
    mask = (b < n)[:, None] & (u < H)[None, :]
    return tl.load(sequence + (start + col)[:, None] * H + u[None, :], mask=mask, other=0.0).to(dtype)


@triton.jit
def clamp(v, limit: tl.constexpr):
    """Clipped to [-limit, limit]; NaN stays. limit 0: as it is."""
    if limit > 0:
        v = tl.where(v > limit, limit, tl.where(v < -limit, -limit, v))
    return v
