"""The reference backend: the recurrence as a loop of torch operations, on any device, differentiable to any order.

Besides being a backend it is where derivatives of derivatives come from: every function here is made of differentiable
torch operations only, so autograd, forward mode and vmap pass through it.

Dims: T steps, B batch, I inputs, H hidden units, R width of the first state (H, or the rows of weight_hr), G gates,
S states, A kept values, P parameters of a unit, M masks, N rows of all steps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gradkernels.backends._extra import FIXED, GIVEN, PLAIN, Extra
from gradkernels.backends._heads import dense, head_by_head
from gradkernels.backends._unroll import unroll, unroll_backward, unroll_tangent
from gradkernels.backends.reference import philox

if TYPE_CHECKING:
    from gradkernels.cells import Cell

Tensors = Sequence[Tensor | None]
CLIPS = True  # its backward clamps the adjoint of h_t


def why_not(
    cell: Cell | None = None, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str | None:
    """The reference runs everywhere."""
    return None


# ---------------------------------------------------------------- rows and steps


class Layout:
    """Which rows of a flat [N, width] tensor make up each step, and back.

    A padded batch with `lengths` is gathered into packed order, rows of the batch by length, the longest first."""

    def __init__(self, x: Tensor, B: int, batch_sizes: Tensor | None, lengths: Tensor | None):
        self.lead = x.shape[:-1]  # of everything that has one row per row of x
        self.index = self.order = None
        self.batch_sizes = batch_sizes
        if lengths is not None:
            T, lengths = x.shape[0], lengths.to(x.device)
            self.order = lengths.argsort(descending=True, stable=True)
            self.inverse = self.order.argsort()
            t = torch.arange(T, device=x.device).unsqueeze(1)
            live = t < lengths[self.order]  # [T, B]
            self.index = (t * B + self.order)[live]
            self.batch_sizes = live.sum(1).cpu()
        if self.batch_sizes is None:
            self.steps = [(t * B, B) for t in range(x.shape[0])]
        else:
            self.steps, first = [], 0
            for n in self.batch_sizes.tolist():
                self.steps.append((first, n))
                first += n

    def rows(self, v: Tensor | None) -> Tensor | None:
        """[*lead, width] -> [rows of all steps, width]"""
        if v is None:
            return None
        v = v.reshape(-1, v.shape[-1])
        return v if self.index is None else v.index_select(0, self.index)

    def kept(self, v: Tensor) -> Tensor:
        """The same of [N, ...], one row per row of x already."""
        return v if self.index is None else v.index_select(0, self.index)

    def spread(self, v: Tensor, *shape: int) -> Tensor:
        """Back from rows of all steps, zero where there was none; `shape` replaces the rows, `lead` being understood."""
        if self.index is not None:
            N = self.lead[0] * self.lead[1]
            v = v.new_zeros(N, *v.shape[1:]).index_copy(0, self.index, v)
        return v.reshape(*(shape or self.lead), *v.shape[1:])

    def batch(self, v: Tensor | None) -> Tensor | None:
        """[B, width] in the order of packed rows."""
        return v if v is None or self.order is None else v.index_select(0, self.order)

    def unbatch(self, v: Tensor) -> Tensor:
        return v if self.order is None else v.index_select(0, self.inverse)

    def places(self, B: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Token and column of the batch of every row, [rows of all steps] each."""
        if self.index is not None:
            return self.index, self.index % B
        token = torch.arange(math.prod(self.lead), device=device)
        if self.batch_sizes is None:
            return token, token % max(B, 1)
        sizes = self.batch_sizes.to(device)
        return token, token - (sizes.cumsum(0) - sizes).repeat_interleave(sizes, output_size=token.shape[0])


def masks(cell: Cell, extra: Extra, token: Tensor, column: Tensor, H: int, dtype: torch.dtype) -> Tensor | None:
    """The masks of a cell, [M, rows, H], for rows that are these tokens and columns of the batch."""
    if not cell.M:
        return None
    unit, out = torch.arange(H, device=token.device), []
    for k in range(cell.M):
        p, high, kind = extra.noise[3 * k : 3 * k + 3]
        if kind == GIVEN:
            assert extra.flags is not None
            out.append(extra.flags.to(dtype)[token].unsqueeze(1).expand(-1, H))
        elif extra.seed is None:
            out.append(torch.full((token.shape[0], H), (1 - p) * high, dtype=dtype, device=token.device))
        else:
            row = (k << 32) + (column if kind == FIXED else extra.first + token)
            out.append(philox.kept(extra.seed, p, row.unsqueeze(1), unit).to(dtype) * high)
    return torch.stack(out)


def precise(v: Any) -> Any:
    """16-bit storage, 32-bit arithmetic."""
    return v.float() if v is not None and v.dtype in (torch.float16, torch.bfloat16) else v


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast has been applied to the arguments; inside, the arithmetic is ours to choose."""
    if torch._C._is_any_autocast_enabled():
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def project(x: Tensor, weight_ih: Tensor | None, bias_ih: Tensor | None) -> Tensor:
    return x if weight_ih is None else F.linear(x, weight_ih, bias_ih)


# ---------------------------------------------------------------- weight gradients


def previous(y: Tensor, h0: Tensor, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """The state entering every packed row, [N, R], by an index."""
    N, B = y.shape[0], h0.shape[0]
    row, sizes = torch.arange(N, device=y.device), batch_sizes.to(y.device)
    ends, none = sizes.cumsum(0), sizes.new_zeros(1)
    step = torch.searchsorted(ends, row, right=True)
    j = row - (ends - sizes)[step]
    if reverse:
        index = torch.where(j < torch.cat([sizes[1:], none])[step], B + row + sizes[step], j)
    else:
        index = torch.where(step == 0, j, B + row - torch.cat([none, sizes[:-1]])[step])
    return torch.cat([h0, y])[index]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a^T b, [n, p] and [n, q] -> [p, q]: a sum over all tokens, in 32 bits where the numbers have 16."""
    if a.dtype not in (torch.float16, torch.bfloat16):
        return a.t() @ b
    if a.is_cuda and torch.version.hip is None and a.shape[0]:
        return torch.mm(a.t(), b, out_dtype=torch.float32)
    return a.t().float() @ b.float()


def weight_gradients(
    cell, dgates, dr, operand, dproj, dparams, x, y, raw, h0, batch_sizes, reverse, need, heads=1, mapped=None
):
    """Gradients of (weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, params), in that order, those that `need[1:]` asks for.

    Everything is rows: dgates, dr [N, G*H], operand [N, H], dproj [N, R], dparams [N, P*H], x [N, I], y [N, R], raw [N, H];
    h0 [B, R], or None where y is the state that enters each row already.
    `mapped`: rows of so many independent batches lie side by side, [N * mapped, ...], and so do those of h0; each gradient
    then has a leading dimension of that size."""
    if mapped is not None:
        apart = lambda v: v.reshape(v.shape[0] // mapped, mapped, v.shape[1])
        of = lambda a, b: torch.bmm(apart(a).permute(1, 2, 0), apart(b).transpose(0, 1))
        total = lambda a: apart(a).sum(0)
    else:
        of, total = product, lambda a: a.sum(0)
    H = dr.shape[1] // cell.G
    K = dr.shape[1] - len(cell.second) * H
    recurrent = head_by_head(of, heads)
    out = []
    if need[1]:
        out.append(of(dgates, x))
    if need[2]:
        out.append(db := total(dgates))
    if need[3] and not cell.recurrent:
        out.append(dr.new_zeros(*(() if mapped is None else (mapped,)), dr.shape[1], 0))
    elif need[3]:
        first = dr[:, :K]
        if h0 is None:
            dw = recurrent(first, y)
        elif batch_sizes is not None:
            dw = recurrent(first, previous(y, h0, batch_sizes, reverse))
        else:
            n = max(0, y.shape[0] - h0.shape[0])
            start, others, before = (
                (first[n:], first[:n], y[y.shape[0] - n :])
                if reverse
                else (first[: first.shape[0] - n], first[first.shape[0] - n :], y[:n])
            )
            dw = recurrent(start, h0[: start.shape[0]]) + recurrent(others, before)
        out.append(torch.cat([dw, recurrent(dr[:, K:], operand)], -2) if cell.second else dw)
    if need[4]:
        out.append(db.clone() if need[2] and dr is dgates else total(dr))
    if need[5]:
        out.append(of(dproj, raw))
    if cell.P and need[6]:
        out.append(total(dparams).unflatten(-1, (cell.P, H)))
    return out


# ---------------------------------------------------------------- the backend


def drawn_masks(cell: Cell, extra: Extra, at: Layout, weight_hh: Tensor, state: Sequence[Tensor]) -> Tensor | None:
    """The masks of all rows in the order of `at`."""
    if not cell.M:
        return None
    places = at.places(state[0].shape[0], weight_hh.device)
    return masks(cell, extra, *places, weight_hh.shape[0] // cell.G, weight_hh.dtype)


def forward(
    cell: Cell,
    x: Tensor,  # [T, B, I] or [N, I] with batch_sizes; the gates, G*H wide, without weight_ih
    weight_ih: Tensor | None,  # [G*H, I]
    bias_ih: Tensor | None,  # [G*H]
    weight_hh: Tensor,  # [G*H, R]
    bias_hh: Tensor | None,  # [G*H]
    weight_hr: Tensor | None,  # [R, H]
    state: Sequence[Tensor],  # S of [B, R], [B, H] ...
    batch_sizes: Tensor | None,  # [T]
    lengths: Tensor | None,  # [B]
    reverse: bool,
    keep: int,
    extra: Extra = PLAIN,
) -> list[Tensor]:
    """[y, (other state sequences,) *final states, (raw,) (acts)]; see the op for `keep`."""
    dtype, at = x.dtype, Layout(x, state[0].shape[0], batch_sizes, lengths)
    x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, params = map(
        precise, (x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, extra.params)
    )
    weight_hh = dense(weight_hh, extra.heads)
    with no_autocast(x.device):
        gates = project(at.rows(x), weight_ih, bias_ih)
        first = [at.batch(precise(v)) for v in state]
        drawn = drawn_masks(cell, extra, at, weight_hh, first)
        seq, final, raw, acts = unroll(
            cell, gates, weight_hh, bias_hh, weight_hr, first, at.steps, reverse, params, drawn, extra.skip
        )
    N = x.reshape(-1, x.shape[-1]).shape[0]
    out = [at.spread(v).to(dtype) for v in (seq if keep else seq[:1])]
    out += [at.unbatch(v).to(dtype, copy=True) for v in final]  # without a step they are the initial ones
    if keep == 2:
        out += [at.spread(v, N).to(dtype) for v in (raw, acts) if v is not None]
    return out


def backward(
    cell: Cell,
    grads: Tensors,  # S like the sequences, S like the final states; None is zero
    x: Tensor,
    weight_ih: Tensor | None,
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    saved: Sequence[Tensor],  # S sequences [.., R], [.., H] ..., (raw [N, H],) acts [N, A, H]
    state: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
    need: Sequence[bool],
    gates: bool,
    norms: bool,
    extra: Extra = PLAIN,
) -> list[Tensor]:
    """[each needed gradient of x, the weights and params, *dstate, (norms)], or with `gates` what those are made of; see the op."""
    S, dtype, at = cell.S, x.dtype, Layout(x, state[0].shape[0], batch_sizes, lengths)
    x, weight_ih, weight_hh, weight_hr, params = map(precise, (x, weight_ih, weight_hh, weight_hr, extra.params))
    weight_hh = dense(weight_hh, extra.heads)
    seq, acts = [at.rows(precise(v)) for v in saved[:S]], at.kept(precise(saved[-1]))
    raw = None if weight_hr is None else at.kept(precise(saved[S]))
    first = [at.batch(precise(v)) for v in state]
    grads = [at.rows(precise(g)) if k < S else at.batch(precise(g)) for k, g in enumerate(grads)]
    with no_autocast(x.device):
        drawn = drawn_masks(cell, extra, at, weight_hh, first)
        dgates, dr, operand, dproj, dparams, ds, size = unroll_backward(
            cell, grads, weight_hh, weight_hr, seq, raw, acts, first, at.steps, reverse, norms, params, drawn, extra.skip, extra.clip
        )  # fmt: skip
        if gates:
            parts = [dgates, dr if cell.split else None, operand, dproj, dparams if cell.P and need[6] else None]
            out = [at.spread(v) for v in parts if v is not None]
        else:
            out = []
            if need[0]:
                out.append(at.spread(dgates if weight_ih is None else dgates @ weight_ih))
            rows = at.rows(x) if need[1] else None
            out += weight_gradients(
                cell, dgates, dr, operand, dproj, dparams, rows, seq[0], raw, first[0], at.batch_sizes, reverse, need,
                extra.heads,
            )  # fmt: skip
    out = [*(v.to(dtype) for v in out), *(at.unbatch(v).to(dtype, copy=True) for v in ds)]
    return [*out, size] if norms else out


def tangent(cell, primal, moving, state, dstate, batch_sizes, lengths, reverse, extra=PLAIN):
    """Forward mode: tangents of the state sequences and of the final states.

    primal: (x, weight_ih, bias_ih, weight_hh, bias_hh, weight_hr, params); moving: their tangents; None is zero."""
    dtype, at = primal[0].dtype, Layout(primal[0], state[0].shape[0], batch_sizes, lengths)
    (x, w_ih, b_ih, w_hh, b_hh, w_hr, params), (dx, dw_ih, db_ih, dw_hh, db_hh, dw_hr, dparams) = (
        map(precise, primal),
        map(precise, moving),
    )
    w_hh, dw_hh = (v if v is None else dense(v, extra.heads) for v in (w_hh, dw_hh))
    with no_autocast(x.device):
        x = at.rows(x)
        gates = project(x, w_ih, b_ih)
        terms = [
            None if dx is None else project(at.rows(dx), w_ih, None),
            None if dw_ih is None else F.linear(x, dw_ih),
            db_ih,
        ]
        dgates = torch.zeros_like(gates)
        for term in terms:
            dgates = dgates if term is None else dgates + term
        values = [at.batch(precise(v)) for v in state], [at.batch(precise(v)) for v in dstate]
        more = params, dparams, drawn_masks(cell, extra, at, w_hh, state), extra.skip
        seq, final = unroll_tangent(
            cell,
            (gates, w_hh, b_hh, w_hr, *values[0]),
            (dgates, dw_hh, db_hh, dw_hr, *values[1]),
            at.steps,
            reverse,
            *more,
        )
    return [at.spread(v).to(dtype) for v in seq], [at.unbatch(v).to(dtype) for v in final]
